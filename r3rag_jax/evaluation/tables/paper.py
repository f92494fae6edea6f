"""What the paper reports (arXiv 2505.23794, Findings of EMNLP 2025), and when a setting is the paper's.

Full dev sets, Wikipedia of 2018, E5-base-v2, five passages per retrieval, at most five steps, ACC by Qwen2.5-72B.
The figures of `max_steps` and `top_k` have no numbers in the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from r3rag_jax.config import Config
from r3rag_jax.models.config import DecoderConfig

# Data set -> a word of its files' names, and the number of its dev questions.
DATASETS = {"hotpotqa": ("hotpot", 7405), "2wiki": ("2wiki", 12576), "musique": ("musique", 2417)}
MODELS = {"Llama-3.1-8B": ("llama", 4096, 32), "Qwen2.5-7B": ("qwen2", 3584, 28)}  # type, width, layers
NUM_PASSAGES = 21_015_324  # of Wikipedia 2018 in passages of 100 words
TOP_K, MAX_STEPS = 5, 5

Numbers = dict[str, dict[str, float]]  # data set -> metric -> number


def _scores(*triples: tuple[float, float, float]) -> Numbers:
    names = ("acc", "f1", "em")
    return {data: dict(zip(names, triple, strict=True)) for data, triple in zip(DATASETS, triples, strict=True)}


def _acc(two_wiki: float, musique: float) -> Numbers:
    return {"2wiki": {"acc": two_wiki}, "musique": {"acc": musique}}


def _tokens(two_wiki: float, musique: float) -> Numbers:
    return {"2wiki": {"tokens_per_acc": two_wiki}, "musique": {"tokens_per_acc": musique}}


MAIN: dict[str, dict[str, Numbers]] = {
    "Llama-3.1-8B": {
        "CoT": _scores((39.2, 38.3, 27.6), (28.8, 34.5, 25.3), (14.0, 17.2, 8.0)),
        "RAG with CoT": _scores((53.3, 50.8, 38.6), (32.9, 40.2, 31.1), (16.3, 18.8, 10.3)),
        "IRCoT": _scores((52.8, 46.0, 39.3), (40.6, 37.5, 35.1), (16.7, 13.6, 12.0)),
        "cold start": _scores((60.6, 55.5, 43.6), (53.7, 53.4, 46.5), (29.6, 29.4, 19.4)),
        "R3-RAG": _scores((64.4, 58.8, 45.6), (61.0, 60.9, 52.9), (32.2, 32.7, 21.1)),
    },
    "Qwen2.5-7B": {
        "CoT": _scores((34.0, 34.0, 23.0), (31.1, 36.9, 27.4), (12.7, 17.0, 6.7)),
        "RAG with CoT": _scores((52.4, 49.4, 37.6), (33.5, 39.1, 30.1), (16.9, 18.8, 9.9)),
        "IRCoT": _scores((48.4, 41.1, 35.7), (35.8, 33.5, 31.1), (13.5, 11.2, 9.4)),
        "cold start": _scores((63.3, 57.6, 45.2), (53.1, 53.5, 46.1), (31.3, 31.9, 21.9)),
        "R3-RAG": _scores((65.5, 59.7, 46.4), (62.3, 62.7, 54.2), (33.6, 34.0, 21.4)),
    },
}
RETRIEVERS: dict[str, dict[str, Numbers]] = {
    "Qwen2.5-7B": {
        "BM25": _scores((63.8, 58.2, 44.9), (59.6, 61.1, 52.8), (29.2, 30.0, 17.6)),
        "E5": MAIN["Qwen2.5-7B"]["R3-RAG"],
        "BGE": _scores((66.4, 60.6, 46.8), (63.0, 63.4, 55.2), (34.8, 34.3, 21.7)),
    }
}
REWARDS: dict[str, dict[str, Numbers]] = {
    "Llama-3.1-8B": {
        "outcome and process": _acc(61.0, 32.2),
        "outcome": _acc(59.0, 31.4),
        "cold start, no RL": _acc(53.7, 29.6),
    }
}
TOKENS: dict[str, Numbers] = {"R3-RAG": _tokens(382, 430), "ReSearch": _tokens(507, 542)}
TABLES: dict[str, dict[str, dict[str, Numbers]]] = {
    "main": MAIN,
    "rewards": REWARDS,
    "retrievers": RETRIEVERS,
    "tokens": dict.fromkeys(MODELS, TOKENS),  # the text does not say of which of its models
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What decides whether a table's numbers may stand beside the paper's.

    Fields:
        columns: name of each set of questions, and how many there are.
        num_passages: of the index; None: not known.
    """

    config: Config
    decoder: DecoderConfig
    columns: dict[str, int]
    num_passages: int | None


def dataset_of(name: str) -> str | None:
    """The paper's data set that a name of questions speaks of: `hotpotqa-dev` -> hotpotqa."""
    return next((data for data, (word, _) in DATASETS.items() if word in name.lower()), None)


def model_of(decoder: DecoderConfig) -> str | None:
    """The paper's model with this shape."""
    shape = decoder.model_type, decoder.hidden_size, decoder.num_layers
    return next((name for name, of_paper in MODELS.items() if of_paper == shape), None)


def paper_rows(table: str, setting: Setting) -> tuple[dict[str, Numbers], list[str]]:
    """The paper's rows of a table, with the columns that are in the setting, and why there are none.

    Returns:
        (title -> column -> metric -> number, sentences); one of the two is empty.
    """
    if table not in TABLES:
        return {}, [f"The paper shows {table} as a figure, without numbers."]
    model = model_of(setting.decoder)
    differing = _differing(table, setting, model)
    if differing or model is None:
        return {}, [f"The paper's rows are not shown, for the setting is not the paper's: {'; '.join(differing)}."]
    data_of = {column: data for column in setting.columns if (data := dataset_of(column)) is not None}
    rows = {
        f"{title} (paper, {model})": {column: numbers[data] for column, data in data_of.items() if data in numbers}
        for title, numbers in TABLES[table][model].items()
    }
    return {title: columns for title, columns in rows.items() if columns}, []


def _differing(table: str, setting: Setting, model: str | None) -> list[str]:
    """What is not as in the paper, in words."""
    config = setting.config
    retrieval, encoder, max_steps = config.retrieval, config.retrieval.encoder, config.rollout.max_steps
    is_e5 = retrieval.kind != "bm25" and "e5-base-v2" in f"{encoder.path} {encoder.endpoint.model}".lower()
    facts: Sequence[tuple[bool, str]] = (
        (model in TABLES[table], f"the model must be {' or '.join(TABLES[table])}"),
        (retrieval.top_k == TOP_K, f"retrieval.top_k must be {TOP_K}, is {retrieval.top_k}"),
        (max_steps == MAX_STEPS, f"rollout.max_steps must be {MAX_STEPS}, is {max_steps}"),
        (table == "retrievers" or is_e5, "the retriever must be E5-base-v2"),
        (
            setting.num_passages == NUM_PASSAGES,
            f"the index must be of the {NUM_PASSAGES:,} passages of Wikipedia 2018, is of "
            + ("an unknown number" if setting.num_passages is None else f"{setting.num_passages:,}"),
        ),
        (config.eval.judge, "eval.judge must be true, as its ACC is a judge's"),
        (config.eval.temperature == 0, "decoding must be greedy"),
    )
    return [words for is_so, words in facts if not is_so] + _differing_questions(setting)


def _differing_questions(setting: Setting) -> list[str]:
    words = []
    for column, num in setting.columns.items():
        data = dataset_of(column)
        if data is not None and num != DATASETS[data][1]:
            words.append(f"{column} must be all {DATASETS[data][1]:,} dev questions, is {num:,}")
    if all(dataset_of(column) is None for column in setting.columns):
        words.append(f"the questions must be of {', '.join(DATASETS)}, named so by file or folder")
    return words
