"""Reports: a data set and a model in; models, tables, figures and summaries in files out."""

from mmh_jax.report.audit import audit
from mmh_jax.report.data import lid_of_data
from mmh_jax.report.detect import detect
from mmh_jax.report.guiding import SampleOptions
from mmh_jax.report.mitigate import mitigate_model
from mmh_jax.report.model import lid_theta, load_model, train_model
from mmh_jax.report.prompt_plan import PromptPlan
from mmh_jax.report.prompted import mitigate_prompts
from mmh_jax.report.published import PublishedOptions, detect_published, is_published
from mmh_jax.report.sampling import sample_model
from mmh_jax.report.stages import PRESETS, Preset, Stages
from mmh_jax.report.ways import MitigationPlan

__all__ = [
    "PRESETS",
    "MitigationPlan",
    "Preset",
    "PromptPlan",
    "PublishedOptions",
    "SampleOptions",
    "Stages",
    "audit",
    "detect",
    "detect_published",
    "is_published",
    "lid_of_data",
    "lid_theta",
    "load_model",
    "mitigate_model",
    "mitigate_prompts",
    "sample_model",
    "train_model",
]
