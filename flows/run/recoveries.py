"""What can be known to fail of what reads data sets before anything is pruned: a training's data, batches and teacher,
and the corpus and the tokenizer of a smaller vocabulary."""

from __future__ import annotations

from flows.spec.run import ModelSpec
from infra.models.card import ModelCard
from infra.models.vocabulary import tokenizer_content, tokens_of
from infra.sources.find import Sources
from pruning.errors import PruningError
from pruning.families import family_named
from pruning.training.adapters import AdapterConfig, check_targets
from pruning.training.data import PlainText, RecordData, data_read
from tasks.devices.placement import device_names
from tasks.execution.context import RunContext
from tasks.execution.stage import importing
from tasks.requests import PruneRequest, RecoverRequest
from tasks.stages.recover import text_data, training_processes


def check_recovery(request: RecoverRequest, card: ModelCard, model: ModelSpec, run_context: RunContext) -> None:
    """Raise what the training would raise about the columns of its data, its batches or its teacher's tokenizer."""
    config, sources = request.typed_config, run_context.sources
    for data in data_read(request.module, config):
        _check_data(data, sources)
    request.module.check_model(config, card.hidden_size, card.max_position_embeddings)
    adapters = config if isinstance(config, AdapterConfig) else getattr(config, "adapters", None)
    if adapters is not None:
        check_targets(adapters, family_named(card.model_type))
    processes = training_processes(run_context.settings)
    if adapters is None:
        config.may_be_sharded(processes, run_context.settings.train_sharded)
    config.check_optimizer(device_names(run_context.settings.device)[0].startswith("cuda"))
    if config.batch_size % (at_once := config.micro_batch_size * processes):
        raise PruningError(
            f"{request.plugin}: batch_size {config.batch_size} is not a multiple of the {at_once} examples that "
            f"{processes} processes take at once: change batch_size, micro_batch_size ({config.micro_batch_size}) or "
            "SLIMLINE_TRAIN_PROCESSES"
        )
    if teacher := getattr(config, "teacher", None):
        _check_teacher(teacher, model, sources)


def check_trained_pruning(request: PruneRequest, card: ModelCard, sources: Sources) -> None:
    """Raise what a pruning that trains would raise about the columns of its data, or lengths and widths."""
    for data in request.module.reads(request.typed_config):
        _check_data(data, sources)
    request.module.check_training(request.typed_config, card.hidden_size, card.max_position_embeddings)
    check_targets(request.typed_config, family_named(card.model_type))


def check_vocabulary(request: PruneRequest, card: ModelCard, model: ModelSpec, sources: Sources) -> None:
    """Raise what making the vocabulary of the dense model smaller would raise about the columns of its corpus, or the
    tokenizer."""
    for data in request.module.reads(request.typed_config):
        _check_data(data, sources)
    content = tokenizer_content(sources.find(model.id, "model", revision=model.revision))
    if content is not None:  # else its import makes one
        request.module.check_tokenizer(request.typed_config, content, card.vocab_size)


def _check_data(data: RecordData | PlainText, sources: Sources) -> None:
    wanted = [data.columns]
    if isinstance(data, RecordData):
        wanted.append((data.output,))  # without an answer there is nothing to learn from a record
    for columns in wanted:
        with importing:  # `datasets` fails while a stage of another cell of the night imports transformers
            sources.check_columns(text_data(data), columns)


def _check_teacher(teacher: str, model: ModelSpec, sources: Sources) -> None:
    own = tokens_of(sources.find(model.id, "model", revision=model.revision))
    theirs = tokens_of(sources.find(teacher, "model"))
    if own is None or theirs is None or own == theirs:
        return  # where it cannot be read without an import, the training itself compares
    token = min(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
    raise PruningError(
        f"the teacher {teacher} has another tokenizer than {model.id}: {token!r} is token {theirs.get(token)} there "
        f"and {own.get(token)} here; distil from a model of the same family"
    )
