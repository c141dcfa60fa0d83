"""Every option of a run (`options`), and the one way to fill them (`loading`).

Neither torch nor the rest of the package is imported here.
"""

from mamba_pretrain.config.checks import ConfigError as ConfigError
from mamba_pretrain.config.data import DataConfig as DataConfig
from mamba_pretrain.config.data import SourceConfig as SourceConfig
from mamba_pretrain.config.data import StageConfig as StageConfig
from mamba_pretrain.config.data import StagePlan as StagePlan
from mamba_pretrain.config.loading import from_dict as from_dict
from mamba_pretrain.config.loading import load as load
from mamba_pretrain.config.loading import save as save
from mamba_pretrain.config.loading import validate as validate
from mamba_pretrain.config.options import AUTO as AUTO
from mamba_pretrain.config.options import PRECISIONS as PRECISIONS
from mamba_pretrain.config.options import VARIANTS as VARIANTS
from mamba_pretrain.config.options import CheckpointConfig as CheckpointConfig
from mamba_pretrain.config.options import Config as Config
from mamba_pretrain.config.options import EvalConfig as EvalConfig
from mamba_pretrain.config.options import FsdpConfig as FsdpConfig
from mamba_pretrain.config.options import LogConfig as LogConfig
from mamba_pretrain.config.options import ModelConfig as ModelConfig
from mamba_pretrain.config.options import OptimConfig as OptimConfig
from mamba_pretrain.config.options import TrainConfig as TrainConfig
from mamba_pretrain.config.options import ZeroConfig as ZeroConfig
