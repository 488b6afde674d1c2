"""Ray Data: a model in every actor of a pool, for the rows of a dataset.

::

    config = ProcessorConfig("model.gguf", concurrency=8, engine_kwargs={"n_parallel": 32})
    processor = build_processor(config, preprocess=lambda row: {"prompt": row["question"]})
    processor(ray.data.read_parquet("questions")).write_parquet("answers")

Rows have the columns of Ray Data's own LLM processors (docs/ray.md), so one can take the other's place.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llamastate.arrays import TokensLike, as_index
from llamastate.errors import InvalidArgumentError

if TYPE_CHECKING:
    import ray.data

__all__ = ["Processor", "ProcessorConfig", "build_processor", "warm"]

Row: TypeAlias = dict[str, Any]
Prefix: TypeAlias = "str | TokensLike | Sequence[Mapping[str, Any]]"


@dataclass(frozen=True)
class ProcessorConfig:
    """What runs where.

    Parameters
    ----------
    model_source : path-like
        A GGUF file, there under this name on every machine.
    engine_kwargs : mapping
        For :class:`~llamastate.batch.BatchRunner`: ``n_parallel``, ``n_ctx``, ``type_k``, ``fixed_shapes``, ...
        ``n_threads`` is ``num_cpus`` unless it says otherwise.
    model_kwargs : mapping
        For :class:`~llamastate.Model`: ``n_gpu_layers``, ``use_mlock``, ...
    task_type : {"generate", "embed"}
        What is made of a prompt: text, or one vector.
    concurrency : int or (int, int)
        Actors; from one number to another if Ray is to choose.
    batch_size : int
        Rows that an actor takes at a time. The more, the fuller its batches, the fewer actors a small dataset needs,
        and the more is done again when an actor is lost.
    max_concurrent_batches : int
        Batches that an actor has under way: rows of the next one run while the last ones of another are finished.
    should_continue_on_error : bool
        A row that fails has ``"Type: message"`` in ``__inference_error__``; otherwise it fails the job.
    sampling_params : mapping
        For what a row's own ``sampling_params`` do not say.
    seed : int
        What seeds are made of, for rows that sample and have none.
    logprobs : bool
        A column ``logprobs``, for rows whose ``sampling_params`` ask for them.
    store : path-like, optional
        Folder of a :class:`~llamastate.PrefixStore`: the actors of a machine share it.
    store_kwargs : mapping
        For the store: ``ram_bytes``, ``disk_bytes``, ...
    remote : str, optional
        URL of what all machines share beyond it, such as ``"s3://bucket/prefixes"``.
    storage_options : mapping
        For fsspec, with ``remote``.
    prefixes : sequence of ray.ObjectRef
        Snapshots to begin with: see :func:`warm`.
    num_cpus, num_gpus : float
        Of each actor. Layers go to a GPU only if ``model_kwargs`` has ``n_gpu_layers``.
    resources : mapping
        Other resources of each actor.
    max_tasks_in_flight_per_actor : int, optional
        As for ``ray.data.ActorPoolStrategy``; by default Ray's choice, twice ``max_concurrent_batches``.
    max_task_retries : int
        How often the rows that an actor died of, or with, are tried again; -1 for ever.
    ray_remote_args : mapping
        More of what ``Dataset.map_batches`` takes for actors: ``memory``, ``runtime_env``, ``accelerator_type``, ...

    Raises
    ------
    InvalidArgumentError
        ``name`` is the field at fault.
    """

    model_source: str | os.PathLike[str]
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    task_type: Literal["generate", "embed"] = "generate"
    concurrency: int | tuple[int, int] = 1
    batch_size: int = 64
    max_concurrent_batches: int = 2
    should_continue_on_error: bool = False
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    logprobs: bool = False
    store: str | os.PathLike[str] | None = None
    store_kwargs: Mapping[str, Any] = field(default_factory=dict)
    remote: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    prefixes: Sequence[Any] = ()
    num_cpus: float = 1
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    max_tasks_in_flight_per_actor: int | None = None
    max_task_retries: int = 3
    ray_remote_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model_source", "store"):
            value = getattr(self, name)
            if value is not None:
                try:
                    path = os.path.expanduser(os.fsdecode(value))
                except TypeError:
                    raise _bad(name, value, "a path") from None
                # workers are elsewhere
                object.__setattr__(self, name, os.path.abspath(path))
        if self.task_type not in ("generate", "embed"):
            raise _bad("task_type", self.task_type, "generate or embed")
        given: Any = self.concurrency
        low, high = given if isinstance(given, tuple) and len(given) == 2 else (given, given)
        if not 1 <= _whole("concurrency", low) <= _whole("concurrency", high):
            raise _bad("concurrency", given, "a number of actors, or two")
        for name, least in (("batch_size", 1), ("max_concurrent_batches", 1), ("max_task_retries", -1)):
            if _whole(name, getattr(self, name)) < least:
                raise _bad(name, getattr(self, name), f"{least} or more")
        _whole("seed", self.seed)
        for name in ("num_cpus", "num_gpus"):
            amount: Any = getattr(self, name)
            if not isinstance(amount, (int, float)) or not 0 <= amount < math.inf:
                raise _bad(name, amount, "0 or more")
        for name in _MAPPINGS:
            if not isinstance(getattr(self, name), Mapping):
                raise _bad(name, getattr(self, name), "a mapping")
        if not isinstance(self.remote, (str, type(None))):
            raise _bad("remote", self.remote, "a URL")


_MAPPINGS = (
    "engine_kwargs",
    "model_kwargs",
    "sampling_params",
    "store_kwargs",
    "storage_options",
    "resources",
    "ray_remote_args",
)


class Processor:
    """Rows in, rows with answers out; nothing runs before Ray executes the dataset. Made by :func:`build_processor`."""

    def __init__(
        self,
        config: ProcessorConfig,
        preprocess: Callable[[Row], Row] | None = None,
        postprocess: Callable[[Row], Row] | None = None,
        preprocess_map_kwargs: Mapping[str, Any] | None = None,
        postprocess_map_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self._preprocess = None if preprocess is None else _Preprocess(preprocess)
        self._postprocess = None if postprocess is None else _Postprocess(postprocess)
        self._preprocess_kwargs = dict(preprocess_map_kwargs or {})
        self._postprocess_kwargs = dict(postprocess_map_kwargs or {})

    def __call__(self, dataset: ray.data.Dataset) -> ray.data.Dataset:
        """The dataset with the columns of the answers.

        Parameters
        ----------
        dataset : ray.data.Dataset
            With a column ``prompt``, ``messages`` or ``tokenized_prompt``, at least after ``preprocess``.

        Raises
        ------
        ray.exceptions.RayTaskError
            When it is executed: a row failed, or a model could not be loaded. It is a :class:`LlamaStateError` of the
            same type, too.
        """
        from ray.data import ActorPoolStrategy, TaskPoolStrategy

        from llamastate.interop.rayactor import Worker
        from llamastate.interop.rayrows import pack

        config = self.config
        low, high = config.concurrency if isinstance(config.concurrency, tuple) else (config.concurrency,) * 2
        # what goes before and after must not wait for cores that the actors have for good
        light: dict[str, Any] = {"num_cpus": 0, "compute": TaskPoolStrategy(size=max(1, high // 8))}
        remote = {"max_task_retries": config.max_task_retries, **config.ray_remote_args}
        if config.resources:
            remote["resources"] = dict(config.resources)
        remote |= {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus}
        before = self._preprocess_kwargs or light
        if self._preprocess is not None:
            dataset = dataset.map(self._preprocess, **before)
        dataset = dataset.map_batches(pack, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **before)
        with warnings.catch_warnings():
            # there is no other way to say how often to try again
            warnings.filterwarnings("ignore", message=".*ray_remote_args.* is deprecated")
            dataset = dataset.map_batches(
                Worker,
                fn_constructor_args=(config,),
                batch_size=config.batch_size,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ActorPoolStrategy(
                    min_size=low,
                    max_size=high,
                    max_tasks_in_flight_per_actor=config.max_tasks_in_flight_per_actor,
                    max_concurrent_calls_per_actor=config.max_concurrent_batches,
                    enable_true_multi_threading=True,
                ),
                **remote,
            )
        if self._postprocess is not None:
            dataset = dataset.map(self._postprocess, **(self._postprocess_kwargs or light))
        return dataset


def build_processor(
    config: ProcessorConfig,
    preprocess: Callable[[Row], Row] | None = None,
    postprocess: Callable[[Row], Row] | None = None,
    *,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """Make a processor of datasets.

    Parameters
    ----------
    config : ProcessorConfig
    preprocess : callable, optional
        A row to the columns that it is to have in addition: ``prompt`` or ``messages``, ``sampling_params``.
    postprocess : callable, optional
        A row with its answer to the row that is wanted. Rows that failed go past it.
    preprocess_map_kwargs, postprocess_map_kwargs : mapping, optional
        For ``Dataset.map``; by default a task for eight actors, which reserves no core.

    Returns
    -------
    Processor
        A callable from dataset to dataset.

    Raises
    ------
    InvalidArgumentError
        There is no such engine, model or store argument.
    ImportError
        Ray is not installed.

    Examples
    --------
    >>> config = ProcessorConfig("model.gguf", concurrency=2)  # doctest: +SKIP
    >>> processor = build_processor(config, preprocess=lambda row: {"prompt": row["text"]})  # doctest: +SKIP
    >>> processor(ray.data.read_parquet("texts")).write_parquet("answers")  # doctest: +SKIP
    """
    _check(config)
    return Processor(config, preprocess, postprocess, preprocess_map_kwargs, postprocess_map_kwargs)


def warm(config: ProcessorConfig, *prefixes: Prefix) -> ProcessorConfig:
    """Process what many prompts begin with, once, for all actors.

    Parameters
    ----------
    config : ProcessorConfig
    *prefixes : str, array-like of int, or sequence of mapping
        Each the beginning of prompts: text, tokens, or the first messages of chats.

    Returns
    -------
    ProcessorConfig
        The same with these prefixes. Their states are in Ray's object store, whose owner is the calling process; an
        actor reads them where they are and copies each byte once, into its context.

    Raises
    ------
    ray.exceptions.RayTaskError
        It is a :class:`LlamaStateError`, too.

    Notes
    -----
    Waits for one Ray task for each prefix, with the resources of an actor. A prompt begins with the longest prefix that
    it has in common with one of these; for models with a sliding window or a recurrent state it must have all of it.
    """
    _check(config)
    import ray

    from llamastate.interop.rayactor import prefill

    task = ray.remote(prefill).options(
        num_returns=2,
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        resources=dict(config.resources),
        **{name: value for name, value in config.ray_remote_args.items() if name in _TASK_ARGS},
    )
    cold = replace(config, prefixes=())
    started = [task.remote(cold, prefix) for prefix in prefixes]
    # the lengths only: the states need not come here
    ray.get([length for length, _ in started])
    return replace(config, prefixes=(*config.prefixes, *(state for _, state in started)))


#: Of what actors take, what a task takes as well.
_TASK_ARGS = ("accelerator_type", "label_selector", "memory", "runtime_env", "scheduling_strategy")


class _Preprocess:
    """The row, and what it is to have in addition."""

    def __init__(self, fn: Callable[[Row], Row]) -> None:
        self._fn = fn

    def __call__(self, row: Row) -> Row:
        return {**row, **self._fn(row)}


class _Postprocess:
    """What is wanted of the row, and whether it failed."""

    def __init__(self, fn: Callable[[Row], Row]) -> None:
        self._fn = fn

    def __call__(self, row: Row) -> Row:
        if row["__inference_error__"]:
            return row
        return {**self._fn(row), "__inference_error__": None}


def _check(config: ProcessorConfig) -> None:
    if not isinstance(config, ProcessorConfig):
        raise _bad("config", config, "a ProcessorConfig")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError("processors of datasets need Ray: pip install 'llamastate[ray]'", name="ray") from error
    from llamastate.batch import BatchRunner
    from llamastate.interop.rayactor import check_keywords
    from llamastate.model import Model
    from llamastate.prefix import PrefixStore

    check_keywords("engine_kwargs", config.engine_kwargs, BatchRunner, taken=("store",))
    check_keywords("model_kwargs", config.model_kwargs, Model, taken=("vocab_only",))
    check_keywords("store_kwargs", config.store_kwargs, PrefixStore, taken=("remote",))


def _whole(name: str, value: object) -> int:
    return as_index(value, name, InvalidArgumentError)


def _bad(name: str, value: object, limit: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} = {value!r} is not {limit}", name=name, value=value, limit=limit)
