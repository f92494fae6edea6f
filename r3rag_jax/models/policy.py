"""The trained language model: its base checkpoint, and creating, loading and saving its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from r3rag_jax.config import ConfigError, LoraConfig, ModelConfig
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.models.hf.decoder_files import (
    check_vocabulary,
    load_config,
    load_decoder,
    load_generation,
    save_decoder,
)
from r3rag_jax.models.lora import TrainableSplit, attach, split_trainable
from r3rag_jax.models.params import PARAM_AXES, param_shardings
from r3rag_jax.models.paths import model_path, reading
from r3rag_jax.parallel.processes import barrier, check_same
from r3rag_jax.parallel.shardings import tree_shardings
from r3rag_jax.run.digests import PROVENANCE_FILE, check_sums, write_sums
from r3rag_jax.run.files import new_directory, write_json
from r3rag_jax.text.chat_template import TEMPLATES, read_template
from r3rag_jax.text.tokenizer import Tokenizer


def model_directory(config: ModelConfig) -> Path:
    """The Hugging Face directory that `model.path` names.

    Raises:
        ConfigError: it is not a directory with config.json.
    """
    if config.path == "bundled":
        return Path(str(files("r3rag_jax") / "world" / "base"))
    path = model_path(config.path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path must be a Hugging Face directory with config.json; got {path}")
    return path


class Policy:
    """Architecture and tokenizer of `model.path`; creates, loads and saves parameters for it.

    A `Policy` holds no parameters. Callers own them as `nnx.State` pytrees on the mesh.
    """

    def __init__(
        self, config: ModelConfig, lora: LoraConfig, mesh: Mesh, *, seed: int, trained_tokens: Sequence[str] = ()
    ):
        """`trained_tokens`: special tokens whose embeddings are trained together with LoRA adapters."""
        self._config, self._lora, self._mesh, self._seed = config, lora, mesh, seed
        self._trained_tokens = trained_tokens

    @functools.cached_property
    def base_path(self) -> Path:
        """The Hugging Face directory of the base checkpoint; see `model_directory`."""
        return model_directory(self._config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `base_path`, with the chat template that `model.chat_template` names.

        Raises:
            UserError: a file is missing or damaged; the tokenizer lacks eos_token, pad_token or a bundled template's
                tokens, or has more ids than the embedding table has rows.
        """
        name = self._config.chat_template
        template = read_template(name) if name else None
        with reading(self.base_path):
            tokenizer = Tokenizer(self.base_path, chat_template=template)
        tokenizer.check_special_tokens()
        check_vocabulary(self.decoder_config, tokenizer, self.base_path)
        if missing := [token for token in TEMPLATES.get(name, ()) if token not in tokenizer]:
            raise ConfigError(
                f"model.chat_template={name} needs a tokenizer with {' '.join(TEMPLATES[name])}; that of "
                f"{self.base_path} lacks {' '.join(missing)}"
            )
        return tokenizer

    @functools.cached_property
    def decoder_config(self) -> DecoderConfig:
        with reading(self.base_path):
            return load_config(self.base_path)

    @functools.cached_property
    def graphdef(self) -> Any:
        """The nnx graphdef of the decoder without adapters."""
        return nnx.split(nnx.eval_shape(self.new_decoder))[0]

    @property
    def param_dtype(self) -> Any:
        """Dtype of the decoder's parameters: float32, or the compute dtype if LoRA freezes them."""
        return jnp.dtype(self._config.dtype if self._lora.rank else "float32")

    def new_decoder(self) -> Decoder:
        """A decoder with random parameters from the run's seed."""
        return Decoder(
            self.decoder_config,
            rngs=nnx.Rngs(self._seed),
            param_dtype=self.param_dtype,
            dtype=jnp.dtype(self._config.dtype),
            attention_implementation=self._config.attention,
        )

    def param_shapes(self) -> Any:
        """The decoder's parameters as a pytree of `jax.ShapeDtypeStruct`s."""
        return nnx.split(nnx.eval_shape(self.new_decoder))[1]

    def param_shardings(self, mesh: Mesh) -> Any:
        """The shardings of the decoder's parameters on a mesh."""
        return tree_shardings(mesh, self.param_shapes(), PARAM_AXES)

    def base_params(self) -> Any:
        """The initial parameters: those of `base_path`, or random ones if `model.init` is "random"."""
        if self._config.init == "random":
            build: Callable[[], Any] = lambda: nnx.split(self.new_decoder())[1]  # noqa: E731
            return jax.jit(build, out_shardings=self.param_shardings(self._mesh))()
        return self.load(self.base_path)

    def load(self, path: Path) -> Any:
        """Load the parameters of a Hugging Face directory to the mesh.

        Raises:
            UserError: a file is missing or damaged, or is not the one that `save` wrote.
        """
        check_sums(path, remedy=f"Restore it, or remove {path} to train its phase from the last checkpoint again")
        weights = sorted(path.glob("*.safetensors"))
        check_same(lambda: [[file.name, file.stat().st_size] for file in weights], f"files of policy {path.name}")
        with reading(path):
            decoder = load_decoder(
                path,
                dtype=jnp.dtype(self._config.dtype),
                param_dtype=self.param_dtype,
                shardings=param_shardings(self._mesh, self.decoder_config),
                attention_implementation=self._config.attention,
            )
        return nnx.split(decoder)[1]

    def save(self, path: Path, params: Any, provenance: Mapping[str, str] | None = None) -> None:
        """Write parameters in float32 as a Hugging Face directory, one matrix at a time.

        All processes must call this. The files are written to a temporary directory, which is renamed to `path` when it
        is complete.

        Args:
            provenance: what the parameters were trained from; it is kept beside them.
        """
        with reading(self.base_path):
            generation = self.tokenizer.complete_generation(load_generation(self.base_path))
        is_writer = jax.process_index() == 0
        with new_directory(path, is_writer=is_writer) as partial:
            save_decoder(nnx.merge(self.graphdef, params), partial, dtype="float32", generation=generation)
            if is_writer:
                self.tokenizer.save(partial)
                if provenance is not None:
                    write_json(partial / PROVENANCE_FILE, dict(provenance))
                write_sums(partial, [file.name for file in partial.iterdir()])
        barrier(f"policy {path.name}")

    def trainable(self, params: Any) -> TrainableSplit:
        """The decoder with these parameters, split into trained and frozen parameters.

        With `lora.rank` > 0 the decoder gets new adapters, and only these and the rows of `trained_tokens` are trained.
        """
        ids = [self.tokenizer.token_id(token) for token in self._trained_tokens]
        decoder = attach(nnx.merge(self.graphdef, params), self._lora, self._mesh, self._seed, ids)
        return split_trainable(decoder, self._lora)
