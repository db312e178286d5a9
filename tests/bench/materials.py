"""What the parts work on: the model and the texts, found as the product finds them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.errors import EvaluationError
from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.perplexity import perplexity
from evaluation.language_modeling.protocol import WindowProtocol
from evaluation.suite import SuiteConfig, SuiteResult
from infra.errors import SourceInvalid, SourceMissing
from infra.models.import_model import import_model, load_tokenizer
from infra.settings import OFFLINE_WORD, load_settings
from infra.sources.find import Sources, TextData, sources_from
from pruning.calibration import CalibrationSet, sample_windows
from pruning.checkpoints.save_load import load_checkpoint
from tasks.stages.evaluate import SuiteSources
from tests.bench.options import Options, Windows
from tests.bench.report import Skipped
from tests.bench.timing import bar, seconds

log = logging.getLogger("slimline.bench")

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
C4 = TextData(dataset="allenai/c4", config="en")
C4_ON_THE_HUB = TextData(dataset="allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz")
WIKITEXT = TextData(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test")
OFFLINE_CALIBRATION = (TextData(dataset="slimline/news"), TextData(dataset="slimline/wikipedia"))
OFFLINE_TEST = TextData(dataset="slimline/wikipedia", split="test")
SEED = 0


@dataclass(frozen=True)
class Texts:
    """Documents and the words for them in a protocol."""

    name: str
    documents: list[str]


class Materials:
    """Finds each thing when a part first asks for it, and keeps it for the next part."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._settings = load_settings()

    @cached_property
    def model_folder(self) -> Path:
        """The folder of --model, or the offline default's model, imported into the scratch folder."""
        if self.options.model is not None:
            return self.options.model
        folder = self.options.scratch / "model"
        folder.mkdir(parents=True)
        with bar(f"import {MODEL}") as progress:
            import_model(self._offline.find(MODEL, "model"), folder, "float32", progress=progress)
        return folder

    @property
    def model_name(self) -> str:
        """For protocols: never a path."""
        return MODEL if self.options.model is None else self.options.model.resolve().name

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model_folder)

    def model(self) -> PreTrainedModel:
        """A fresh copy in float32 on the CPU."""
        return load_checkpoint(self.model_folder, dtype=torch.float32)

    def evaluate(
        self,
        suite: ModuleType,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SuiteConfig,
        title: str,
    ) -> tuple[SuiteResult, float]:
        """What a suite finds, and its seconds. Raises Skipped when its data is not to be had."""
        try:
            with bar(title) as progress:
                return seconds(
                    lambda: suite.evaluate(model, tokenizer, self._suite_data, config, EvalOptions(progress=progress)),
                    model.device.type,
                )
        except (EvaluationError, SourceMissing, SourceInvalid) as error:
            raise Skipped(f"it needs the tasks' data: {error}") from error

    def data_folder(self, repo_id: str) -> Path | None:
        """Where suites find a data set; None for the hub. Raises Skipped when it is not to be had."""
        try:
            return self._suite_data.folder(repo_id)
        except (SourceMissing, SourceInvalid) as error:
            raise Skipped(f"it needs the tasks' data: {error}") from error

    @cached_property
    def c4(self) -> Texts:
        """P1's calibration text. Raises Skipped when it is not to be had."""
        try:
            located = self._sources.find(C4.dataset, "dataset")
            return self._texts(self._sources, C4 if located.folder is not None else C4_ON_THE_HUB)
        except (SourceMissing, SourceInvalid) as error:
            raise Skipped(f"it needs C4: {error}") from error

    @cached_property
    def wikitext(self) -> Texts:
        """P1's test text. Raises Skipped when it is not to be had."""
        try:
            return self._texts(self._sources, WIKITEXT)
        except (SourceMissing, SourceInvalid) as error:
            raise Skipped(f"it needs WikiText-2: {error}") from error

    @cached_property
    def tokens_only(self) -> Texts:
        """For parts where only the number of tokens matters: C4, else offline text, whose name the protocol tells."""
        try:
            return self.c4
        except Skipped:
            parts = [self._texts(self._offline, data) for data in OFFLINE_CALIBRATION]
            documents = [document for part in parts for document in part.documents]
            return Texts(" and ".join(part.name for part in parts), documents)

    @cached_property
    def comparison(self) -> Texts:
        """For perplexities that are only compared with each other: WikiText-2, else offline Wikipedia."""
        try:
            return self.wikitext
        except Skipped:
            return self._texts(self._offline, OFFLINE_TEST)

    def calibration(self, texts: Texts, windows: Windows, *, num_heldout: int) -> CalibrationSet:
        """Windows as the product draws them, seed 0."""
        source = {"dataset": texts.name}
        return sample_windows(
            self.tokenizer,
            texts.documents,
            num_samples=windows.count,
            seq_len=windows.length,
            seed=SEED,
            num_heldout=num_heldout,
            source=source,
        )

    def ppl(self, model: PreTrainedModel, texts: Texts) -> float:
        """Perplexity in P1's windows."""
        measured = perplexity(model.to(self.options.device), self.tokenizer, texts.documents, self._p1_windows)
        return measured.ppl

    def ppl_protocol(self, texts: Texts) -> str:
        windows = self.options.p1_windows
        return (
            f'PPL on {texts.name} joined by blank lines ("\\n\\n"), no BOS, non-overlapping windows of '
            f"{windows.length} tokens, the first {windows.count} of a permutation with seed 1"
        )

    def calibration_protocol(self, texts: Texts, windows: Windows, num_heldout: int) -> str:
        return f"calibration on {windows} tokens of {texts.name}, {num_heldout} windows held out, seed {SEED}, no BOS"

    @property
    def _p1_windows(self) -> WindowProtocol:
        windows = self.options.p1_windows
        return WindowProtocol(window=windows.length, bos="none", max_windows=windows.count, window_seed=1)

    @cached_property
    def _suite_data(self) -> SuiteSources:
        return SuiteSources(self._sources)

    @cached_property
    def _sources(self) -> Sources:
        return sources_from(self.options.mirror, self._settings)

    @cached_property
    def _offline(self) -> Sources:
        return sources_from(OFFLINE_WORD, self._settings)

    @staticmethod
    def _texts(sources: Sources, data: TextData) -> Texts:
        words = [data.dataset, data.config or data.data_files or "", data.split]
        return Texts(" ".join(word for word in words if word), sources.texts(data))
