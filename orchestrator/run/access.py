"""Who may use a Ray cluster: its token, and what this process shows of it.

Ray reads the environment variables RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH once in each process and remembers
them; so what is changed here is read again (`_environment`).
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

ANSWER = 10.0
"""Seconds in which a cluster must answer."""
LOCAL_ONLY = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
"""With it Ray listens on 127.0.0.1, and looks for clusters there, as by default on systems where it supports no clusters."""
_LONGEST_PARENT = 20
"""Characters of a folder below which the paths of Ray's sockets stay within the system's 107."""


class AccessError(RuntimeError):
    """A cluster that this process cannot use or start."""


@contextmanager
def private_cluster() -> Iterator[Path]:
    """The cluster that is started in the block is open to this process and its children alone: it listens on 127.0.0.1 and
    asks for a random token. Gives the folder that Ray is to keep its files in, which nobody else can look into.

    Ray's log files stay there afterwards, the token does not. Raises AccessError where there is no place for them.
    """
    parent = get_default_system_temp_dir()
    if len(parent) > _LONGEST_PARENT:
        parent = "/tmp"
    try:
        folder = Path(tempfile.mkdtemp(prefix="troupe-", dir=parent))
        file = folder / "token"
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as opened:
            opened.write(secrets.token_hex(32))
    except OSError as error:
        raise AccessError(f"TMPDIR: nothing can be written in {parent}: {error.strerror}") from error
    lock = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # not all file systems have locks
        fcntl.flock(lock, fcntl.LOCK_SH)  # services that remove old files from /tmp leave a locked folder alone
    try:
        with _environment(_showing(file) | LOCAL_ONLY):
            yield folder / "ray"
    finally:
        file.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def admitted(address: str) -> Iterator[None]:
    """In the block this process uses the cluster at HOST:PORT: with its token where it has one, with none where it has none.

    Raises:
        AccessError: nothing answers there, or no Ray cluster, or one whose token is not known here, or one of another
            version of Ray or Python.
    """
    local = LOCAL_ONLY if address.startswith("127.") else {}
    with _environment({"RAY_AUTH_MODE": "disabled"} | local):
        open_to_all = _lets_in(address)
    mode = "disabled" if open_to_all else "token"
    with _environment({"RAY_AUTH_MODE": mode} | local):
        if not open_to_all:
            _refuse_without_token()
            if not _lets_in(address):
                raise AccessError(f"a cluster with another token than the one {_source()}")
        _refuse_other_version(address)
        yield


def place_of_token() -> str | None:
    """Where the token of the cluster in use is, in words; None where it has none."""
    if not is_token_auth_enabled():
        return None
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or str(_default_file())


def _refuse_without_token() -> None:
    try:
        found = AuthenticationTokenLoader.instance().has_token()
    except AuthenticationError:  # the file that RAY_AUTH_TOKEN_PATH names is not there, or empty
        found = False
    if not found:
        raise AccessError(f"a cluster that asks for a token (RAY_AUTH_MODE=token), and there is none {_source()}")


def _source() -> str:
    """Where Ray looks for a token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "in the environment variable RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return f"in {path} (RAY_AUTH_TOKEN_PATH)"
    return f"in {_default_file()}, nor in a file that RAY_AUTH_TOKEN_PATH names, nor in RAY_AUTH_TOKEN"


def _default_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _showing(file: Path) -> dict[str, str | None]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(file)}


# ---------------------------------------------------------------- questions to a cluster


def _lets_in(address: str) -> bool:
    """Whether a cluster accepts what this process shows. Raises AccessError where no cluster answers.

    Ray's own client asks for 20 seconds or more, and writes to the terminal meanwhile.
    """
    try:
        with closing(init_grpc_channel(address)) as channel:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=ANSWER)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return False
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise AccessError(f"where no Ray cluster answers: {error.details()}") from error
        raise AccessError(f"where something else than a Ray cluster answers: {error.details()}") from error
    return True


def _refuse_other_version(address: str) -> None:
    namespace = ray_constants.KV_NAMESPACE_CLUSTER
    request = InternalKVGetRequest(key=CLUSTER_METADATA_KEY, namespace=namespace)
    with closing(init_grpc_channel(address)) as channel:
        reply = InternalKVGcsServiceStub(channel).InternalKVGet(request, timeout=ANSWER)
    if not reply.value:  # of a cluster that is about to start; Ray itself asks once more
        return
    theirs = json.loads(reply.value)
    try:
        utils.check_version_info(theirs, "this machine")
    except RuntimeError as error:
        ray, python = utils.compute_version_info()
        raise AccessError(
            f"a cluster of Ray {theirs['ray_version']} and Python {theirs['python_version']}; this process has Ray {ray} and "
            f"Python {python}, and both must be the same"
        ) from error


# ---------------------------------------------------------------- the environment


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables in the block, None for none, for this process's Ray and what is started meanwhile."""
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
    # What Ray has read of them when it was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, True)
