"""The settings of a run.

The docstring below a field is its documentation: `troupe config` and docs/settings.md are generated from it.
Each default is defined here and nowhere else.
"""

from configs.schema.advantages import AnswerAdvantageSettings as AnswerAdvantageSettings
from configs.schema.advantages import GAEAdvantage as GAEAdvantage
from configs.schema.advantages import ReinforceAdvantage as ReinforceAdvantage
from configs.schema.base import MAX_SERVED_RANK as MAX_SERVED_RANK
from configs.schema.base import ROLES as ROLES
from configs.schema.base import BelowOne as BelowOne
from configs.schema.base import FilePath as FilePath
from configs.schema.base import Fraction as Fraction
from configs.schema.base import FunctionPath as FunctionPath
from configs.schema.base import ModelPath as ModelPath
from configs.schema.base import Overlong as Overlong
from configs.schema.base import Role as Role
from configs.schema.base import Seconds as Seconds
from configs.schema.base import Settings as Settings
from configs.schema.base import Shared as Shared
from configs.schema.base import with_home as with_home
from configs.schema.data import DatasetSettings as DatasetSettings
from configs.schema.evaluation import EVALUATION_METRICS as EVALUATION_METRICS
from configs.schema.evaluation import EvaluationSettings as EvaluationSettings
from configs.schema.infra import CheckpointSettings as CheckpointSettings
from configs.schema.infra import ClusterSettings as ClusterSettings
from configs.schema.infra import DeadlineSettings as DeadlineSettings
from configs.schema.infra import GroupSettings as GroupSettings
from configs.schema.infra import LoggerSettings as LoggerSettings
from configs.schema.infra import OffloadSettings as OffloadSettings
from configs.schema.infra import PlacementSettings as PlacementSettings
from configs.schema.infra import RayMetricsSettings as RayMetricsSettings
from configs.schema.infra import RecoverySettings as RecoverySettings
from configs.schema.infra import RolloutSettings as RolloutSettings
from configs.schema.infra import TensorBoardSettings as TensorBoardSettings
from configs.schema.infra import VerifySettings as VerifySettings
from configs.schema.infra import WeightSyncSettings as WeightSyncSettings
from configs.schema.kl import AdaptiveKL as AdaptiveKL
from configs.schema.kl import FixedKL as FixedKL
from configs.schema.kl import KLSettings as KLSettings
from configs.schema.losses import Aggregation as Aggregation
from configs.schema.losses import PolicyLossSettings as PolicyLossSettings
from configs.schema.losses import PPOClipLoss as PPOClipLoss
from configs.schema.losses import ReinforceLoss as ReinforceLoss
from configs.schema.model import LoraSettings as LoraSettings
from configs.schema.model import ModelSettings as ModelSettings
from configs.schema.rewards import FunctionReward as FunctionReward
from configs.schema.rewards import FunctionSettings as FunctionSettings
from configs.schema.rewards import HttpReward as HttpReward
from configs.schema.rewards import Judge as Judge
from configs.schema.rewards import ModelReward as ModelReward
from configs.schema.rewards import Reward as Reward
from configs.schema.rl import REWARD_METRICS as REWARD_METRICS
from configs.schema.rl import AnswerLogSettings as AnswerLogSettings
from configs.schema.rl import PPOSettings as PPOSettings
from configs.schema.rl import PretrainingMix as PretrainingMix
from configs.schema.run import RunConfig as RunConfig
from configs.schema.sampling import SamplingSettings as SamplingSettings
from configs.schema.training import BatchSettings as BatchSettings
from configs.schema.training import OptimizerSettings as OptimizerSettings
from configs.schema.training import RewardModelSettings as RewardModelSettings
from configs.schema.training import SFTSettings as SFTSettings
from configs.zero import Strategy as Strategy
