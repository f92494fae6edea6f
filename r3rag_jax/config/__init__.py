"""Configuration of an experiment: one pydantic model a section, read strictly from YAML and `key=value` overrides."""

from r3rag_jax.config.baselines import BaselinesConfig, NaiveRAGConfig
from r3rag_jax.config.cli import FlagParser, parse_args
from r3rag_jax.config.coldstart import ColdStartConfig, LocalTeacherConfig, TeacherConfig
from r3rag_jax.config.data import DataConfig
from r3rag_jax.config.endpoint import EndpointConfig
from r3rag_jax.config.evaluation import SYSTEMS, EvalConfig
from r3rag_jax.config.experiment import PHASES, Config
from r3rag_jax.config.guards import GuardsConfig
from r3rag_jax.config.judge import JudgeConfig, LocalJudgeConfig
from r3rag_jax.config.loader import load_config, to_yaml
from r3rag_jax.config.log import LogConfig
from r3rag_jax.config.mesh import MeshConfig
from r3rag_jax.config.model import PROJECTIONS, LoraConfig, ModelConfig
from r3rag_jax.config.retrieval import EncoderConfig, RemoteRetrieverConfig, RetrievalConfig
from r3rag_jax.config.rewards import RewardConfig
from r3rag_jax.config.rl import CriticConfig, KLConfig, RLConfig
from r3rag_jax.config.rollout import RolloutConfig, ServerConfig
from r3rag_jax.config.section import ConfigError, Section
from r3rag_jax.config.sft import SFTConfig
from r3rag_jax.config.world import MAX_SEED, WorldConfig

__all__ = [
    "MAX_SEED",
    "PHASES",
    "PROJECTIONS",
    "SYSTEMS",
    "BaselinesConfig",
    "ColdStartConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "EncoderConfig",
    "EndpointConfig",
    "EvalConfig",
    "FlagParser",
    "GuardsConfig",
    "JudgeConfig",
    "KLConfig",
    "LocalJudgeConfig",
    "LocalTeacherConfig",
    "LogConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "NaiveRAGConfig",
    "RLConfig",
    "RemoteRetrieverConfig",
    "RetrievalConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "Section",
    "ServerConfig",
    "TeacherConfig",
    "WorldConfig",
    "load_config",
    "parse_args",
    "to_yaml",
]
