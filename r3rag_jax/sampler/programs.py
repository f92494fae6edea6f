"""The sampler's jitted programs for a mesh, with the shapes and shardings of their arguments.

The engine runs these programs. A machine without the mesh's devices can compile the same ones, because nothing is
allocated here:

    programs = SamplerPrograms(config, mesh, slots=64, max_length=3072, dtype=jnp.bfloat16)
    for program in programs.all(programs.abstract_decoder(jnp.bfloat16)):
        print(program.name, program.lower().compile().memory_analysis())
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.parallel.shardings import RULES, batch_shardings, batch_ways, replicated
from r3rag_jax.sampler import decode as functions
from r3rag_jax.sampler.cache.base import padded
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.distribution import WHOLE, Truncation
from r3rag_jax.sampler.exchange import GatheredWeights, PartialSums
from r3rag_jax.sampler.ops import SamplerOps
from r3rag_jax.sampler.prefill_plan import PrefillPlan
from r3rag_jax.sampler.state import DecodeState, Rows
from r3rag_jax.sampler.stops import MAX_STOPS
from r3rag_jax.sampler.windows import Window, windows

SHARED = 8  # sets of programs that are kept for the next engine of their shape


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes of its arguments."""

    name: str  # e.g. "decode 64x3072" (rows x positions), "prefill 16x1x512" (devices x rows of each x tokens), "copy"
    function: Any  # jitted
    args: tuple[Any, ...]  # pytrees of `jax.ShapeDtypeStruct` with shardings, or of arrays
    static: dict[str, Any]  # static keyword arguments
    num_tokens: int  # tokens that one run of it, or one step of a decode call, feeds to the model, padding included

    def lower(self) -> jax.stages.Lowered:
        """Trace and lower it; `.compile()` of the result is what the engine runs for arguments of these shapes."""
        return self.function.lower(*self.args, **self.static)


class SamplerPrograms:
    """The programs of one `Engine`: decode for each window, prefill for each chunk shape, row copies."""

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        slots: int,
        max_length: int,
        decode_chunk: int = 32,
        truncation: Truncation = WHOLE,
        dtype: Any = jnp.float32,
        shard_weights: bool = False,
        ops: SamplerOps | None = None,
    ):
        """Jit the programs; nothing is allocated or compiled. Arguments: see `Engine`.

        Args:
            mesh: may consist of devices that this process does not have.
        """
        self.config, self.mesh, self.max_length, self.decode_chunk = config, mesh, max_length, decode_chunk
        self.ops = SamplerOps.of(mesh) if ops is None else ops
        self._shard_weights = shard_weights
        cache_of = functools.partial(KVCache.init, config, slots, padded(max_length), dtype, self.ops)
        cache = jax.eval_shape(cache_of)
        self.cache: KVCache = _with_shardings(cache, cache.shardings(mesh))
        cache_shardings = jax.tree.map(lambda x: x.sharding, self.cache)
        self._cache_specs = jax.tree.map(lambda sharding: sharding.spec, cache_shardings)
        are_rows_split = batch_ways(mesh, slots) > 1
        self._row_axes = RULES["batch"] if are_rows_split else None
        self._group = {
            "tensor": mesh.shape["tensor"],
            "fsdp": mesh.shape["fsdp"] if shard_weights else 1,
            "are_rows_split": are_rows_split,
        }
        self.windows = windows(cache, mesh, max_length)
        self.plan = PrefillPlan(self.ops.target, slots, batch_ways(mesh, slots))
        self.init_cache = jax.jit(cache_of, out_shardings=cache_shardings)
        self.rows_shardings = batch_shardings(mesh, self._rows(slots))  # of the decode state, whatever the window
        replicated_rows = jax.tree.map(lambda _: replicated(mesh), self.rows_shardings)
        run = functools.partial(functions.decode, truncation=truncation)
        self.decode = jax.jit(
            functools.partial(self._decode, run),
            static_argnames="positions",
            donate_argnums=1,  # the cache; the rows come back replicated, in another layout
            out_shardings=DecodeState(cache=cache_shardings, rows=replicated_rows),
        )
        self.prefill = jax.jit(self._prefill, donate_argnums=1, out_shardings=cache_shardings)
        self.copy = jax.jit(self._copy, donate_argnums=0, out_shardings=cache_shardings)
        self.load = functools.cache(self._load)

    def _load(self, graphdef: Any) -> Any:
        """Return the jitted function from parameters (a state of `graphdef`, of a `Decoder`) to a `CachedDecoder`."""

        def load(params: Any) -> CachedDecoder:
            decoder = jax.tree.map(jnp.copy, CachedDecoder.of(nnx.merge(graphdef, params), self.ops))
            return jax.lax.with_sharding_constraint(decoder, self.decoder_shardings(decoder))

        return jax.jit(load)

    def decoder_shardings(self, decoder: CachedDecoder) -> CachedDecoder:
        """The sharding of each parameter of a loaded decoder."""
        return decoder.shardings(self.mesh, self._shard_weights)

    def abstract_decoder(self, dtype: Any) -> CachedDecoder:
        """The shapes and shardings of a loaded decoder whose compute dtype is `dtype`."""
        new = lambda: CachedDecoder.of(Decoder(self.config, rngs=nnx.Rngs(0), dtype=dtype), self.ops)  # noqa: E731
        decoder = jax.eval_shape(new)
        return _with_shardings(decoder, self.decoder_shardings(decoder))

    def all(self, decoder: CachedDecoder) -> list[Program]:
        """Every program that an engine can run with this decoder, which is loaded or abstract: 19 at most."""
        shapes = [chunk.tokens.shape for chunk in self.plan.empty_chunks()]
        prefills = [self.prefill_program(decoder, size, length) for _, size, length in dict.fromkeys(shapes)]
        decodes = [self.decode_program(decoder, window) for window in self.windows]
        return [self.copy_program(), *prefills, *decodes]

    def decode_program(self, decoder: CachedDecoder, window: Window | None = None) -> Program:
        """The decode program for a window; None: the largest, all rows and positions."""
        window = window or self.windows[-1]
        number, stops = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((MAX_STOPS,), np.int32)
        cache_rows = jax.ShapeDtypeStruct((window.rows,), np.int32)
        args = (
            decoder, self.cache, cache_rows, _with_shardings(self._rows(window.rows), self.rows_shardings),
            number, number, stops, stops,
        )  # fmt: skip
        name = f"decode {window.rows}x{window.positions}"
        return Program(name, self.decode, args, {"positions": window.positions}, window.rows)

    def prefill_program(self, decoder: CachedDecoder, rows: int, length: int) -> Program:
        """The prefill program for chunks of `rows` rows on each device that has rows, and `length` tokens of each."""
        chunk = jax.eval_shape(lambda: tuple(self.plan.empty_chunk(rows, length)))
        args = decoder, self.cache, *_with_shardings(chunk, batch_shardings(self.mesh, chunk))
        ways = chunk[1].shape[0]
        return Program(f"prefill {ways}x{rows}x{length}", self.prefill, args, {}, ways * rows * length)

    def copy_program(self) -> Program:
        """The program that copies the keys and values of rows."""
        rows = jax.eval_shape(self.plan.empty_copies)[0]
        rows = _with_shardings(rows, batch_shardings(self.mesh, rows))
        return Program("copy", self.copy, (self.cache, rows, rows), {}, 0)

    def _decode(self, run: Any, decoder: CachedDecoder, cache: KVCache, *args: Any, positions: int) -> DecodeState:
        """`decode.decode`, on each device of the mesh."""
        run = functools.partial(run, positions=positions)
        if self.mesh.size == 1:
            return run(decoder, cache, *args)
        exchange = PartialSums(**self._group)
        rows: Any = PartitionSpec(self._row_axes)
        whole = PartitionSpec()
        state = DecodeState(cache=self._cache_specs, rows=rows)
        ins = self._decoder_specs(decoder), self._cache_specs, rows, rows, whole, whole, whole, whole
        return self._on_each_device(functools.partial(run, exchange=exchange), ins, state)(decoder, cache, *args)

    def _prefill(self, decoder: CachedDecoder, cache: KVCache, *chunk: Any) -> KVCache:
        """`decode.prefill`, on each device of the mesh."""
        if self.mesh.size == 1:
            return functions.prefill(decoder, cache, *chunk)
        splits_tokens = self._group["tensor"] > 1 and chunk[1].shape[2] % self._group["tensor"] == 0
        run = functools.partial(functions.prefill, exchange=GatheredWeights(**self._group, splits_tokens=splits_tokens))
        ins = self._decoder_specs(decoder), self._cache_specs, *[PartitionSpec(self._row_axes)] * 3
        return self._on_each_device(run, ins, self._cache_specs)(decoder, cache, *chunk)

    def _copy(self, cache: KVCache, *rows: jax.Array) -> KVCache:
        """`decode.copy`, on each device of the mesh."""
        if self.mesh.size == 1:
            return functions.copy(cache, *rows)
        ins = self._cache_specs, *[PartitionSpec(self._row_axes)] * 2
        return self._on_each_device(functions.copy, ins, self._cache_specs)(cache, *rows)

    def _on_each_device(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        # Results that all devices of `tensor` compute alike are equal by construction, which is not checked.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _decoder_specs(self, decoder: CachedDecoder) -> CachedDecoder:
        return jax.tree.map(lambda sharding: sharding.spec, self.decoder_shardings(decoder))

    def _rows(self, num_rows: int) -> Any:
        """The shapes of the decode state of a window with `num_rows` rows."""
        rows = Rows.empty(num_rows, self.max_length)
        return jax.eval_shape(lambda: rows.decode_rows(np.arange(num_rows), self.decode_chunk))


@functools.lru_cache(SHARED)
def shared_programs(config: DecoderConfig, mesh: Mesh, **options: Any) -> SamplerPrograms:
    """The programs for these arguments of `SamplerPrograms`: engines that are alike trace and compile each once."""
    return SamplerPrograms(config, mesh, **options)


def _with_shardings(tree: Any, shardings: Any) -> Any:
    """Return the `jax.ShapeDtypeStruct`s of arrays or shapes with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
