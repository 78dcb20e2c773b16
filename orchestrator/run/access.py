"""Access to a Ray cluster: its token, and how this process authenticates.

Ray reads the environment variables RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH once in each process and caches
them; so `_environment` changes them and makes Ray read them again.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import grpc
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants, utils
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # its stubs lack them
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest, InternalKVGetRequest
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub, NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

RESPONSE_TIMEOUT_S = 10.0
"""Seconds in which a cluster must respond."""
LOCAL_ONLY = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
"""Makes Ray listen on 127.0.0.1 and look for clusters there; the default on systems where Ray supports no clusters."""
_MAX_PARENT_LENGTH = 20
"""Characters of the parent folder's path: the paths of Ray's sockets in it then stay within the system's limit of 107."""


class AccessError(RuntimeError):
    """This process cannot use or start the cluster."""


@contextmanager
def private_cluster() -> Iterator[Path]:
    """A cluster started in the block accepts only this process and its children: it listens on 127.0.0.1 and requires a random
    token. Yields the folder for Ray's files, which only this user can read.

    The token is removed at the end; Ray's log files stay. Raises AccessError if the folder cannot be made.
    """
    parent = get_default_system_temp_dir()
    if len(parent) > _MAX_PARENT_LENGTH:
        parent = "/tmp"
    try:
        folder = Path(tempfile.mkdtemp(prefix="troupe-", dir=parent))
        file = folder / "token"
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as opened:
            opened.write(secrets.token_hex(32))
    except OSError as error:
        raise AccessError(f"TMPDIR: cannot write to {parent}: {error.strerror}") from error
    lock = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some file systems have no locks
        fcntl.flock(lock, fcntl.LOCK_SH)  # services that remove old files from /tmp keep locked folders
    try:
        with _environment(_token_variables(file) | LOCAL_ONLY):
            yield folder / "ray"
    finally:
        file.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def authenticated(address: str) -> Iterator[None]:
    """Use the cluster at HOST:PORT in the block, with a token if the cluster requires one.

    Raises:
        AccessError: no Ray cluster responds there, or it requires a token that this process does not have, or it has another
            version of Ray or Python.
    """
    local = LOCAL_ONLY if address.startswith("127.") else {}
    with _environment({"RAY_AUTH_MODE": "disabled"} | local):
        needs_no_token = _accepts(address)
    mode = "disabled" if needs_no_token else "token"
    with _environment({"RAY_AUTH_MODE": mode} | local):
        if not needs_no_token:
            _refuse_without_token()
            if not _accepts(address):
                raise AccessError(f"a cluster whose token is not the one {_source()}")
        _refuse_other_version(address)
        yield


def token_location() -> str | None:
    """Where the token of the current cluster is stored; None if it has none."""
    if not is_token_auth_enabled():
        return None
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or str(_default_file())


def _refuse_without_token() -> None:
    try:
        has_token = AuthenticationTokenLoader.instance().has_token()
    except AuthenticationError:  # the file of RAY_AUTH_TOKEN_PATH is missing or empty
        has_token = False
    if not has_token:
        raise AccessError(f"a cluster that requires a token (RAY_AUTH_MODE=token), but there is none {_source()}")


def _source() -> str:
    """The places where Ray looks for a token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "in the environment variable RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return f"in {path} (RAY_AUTH_TOKEN_PATH)"
    return f"in {_default_file()}, in a file named by RAY_AUTH_TOKEN_PATH, or in RAY_AUTH_TOKEN"


def _default_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _token_variables(file: Path) -> dict[str, str | None]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(file)}


# ---------------------------------------------------------------- requests to a cluster


def _accepts(address: str) -> bool:
    """Whether a cluster accepts this process's token. Raises AccessError if no cluster responds.

    Ray's own client tries for 20 seconds or more and writes to the terminal meanwhile.
    """
    try:
        with closing(init_grpc_channel(address)) as channel:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=RESPONSE_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return False
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise AccessError(f"where no Ray cluster responds: {error.details()}") from error
        raise AccessError(f"where something other than a Ray cluster responds: {error.details()}") from error
    return True


def _refuse_other_version(address: str) -> None:
    namespace = ray_constants.KV_NAMESPACE_CLUSTER
    request = InternalKVGetRequest(key=CLUSTER_METADATA_KEY, namespace=namespace)
    with closing(init_grpc_channel(address)) as channel:
        reply = InternalKVGcsServiceStub(channel).InternalKVGet(request, timeout=RESPONSE_TIMEOUT_S)
    if not reply.value:  # the cluster is still starting; Ray itself checks again
        return
    cluster_info = json.loads(reply.value)
    try:
        utils.check_version_info(cluster_info, "this machine")
    except RuntimeError as error:
        ray, python = utils.compute_version_info()
        raise AccessError(
            f"a cluster of Ray {cluster_info['ray_version']} and Python {cluster_info['python_version']}; this process has "
            f"Ray {ray} and Python {python}, and both must be the same"
        ) from error


# ---------------------------------------------------------------- the environment


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables in the block (None: unset), for this process's Ray and for processes started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # Ray read these when it was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, True)
