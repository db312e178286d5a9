"""Pruned and repaired output linears of every site at a few levels, and the model that one level of each makes.

Shapes: O outputs of a linear, K kept inputs, N groups, D columns of a group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruning.checkpoints.decoder import Decoder
from pruning.families import shapes
from pruning.families.forward import output_linear, silence_
from pruning.families.head_norms import mask_head_norms_
from pruning.families.sites import Site, sites_of
from pruning.layerwise.prune import layer_plan
from pruning.walk.state import SubLayerReport

if TYPE_CHECKING:
    from pruning.allocation.budget import HeadUnit
    from pruning.plan import LayerPlan


class LevelRecord(BaseModel):
    """What has gone from a site at one level, group by group in the order it went, and what that cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gone: tuple[int, ...]
    report: SubLayerReport

    @property
    def kept(self) -> tuple[int, ...]:
        """The groups that stay, ascending."""
        gone = set(self.gone)
        return tuple(group for group in range(self.report.total) if group not in gone)


@dataclass(frozen=True)
class Level:
    """A record and the weight of the kept columns (O, K); None where nothing has gone, and the weight is the dense
    model's."""

    record: LevelRecord
    weight_OK: Tensor | None


class LevelDatabase:
    """Levels by the name of their output linear and a label. folder: where they lie, in a file each; None: in memory.

    A file that is there is whole. What is written again is replaced.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._levels = folder, dict[tuple[str, str], Level]()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, site: str, label: str, level: Level) -> None:
        """Keep a level; its weight is moved to the host."""
        weight_OK = None if level.weight_OK is None else level.weight_OK.detach().cpu().contiguous()
        if self._folder is None:
            self._levels[site, label] = Level(level.record, weight_OK)
            return
        path = self._file(site, label)
        unfinished = path.with_suffix(".unfinished")
        tensors = {} if weight_OK is None else {"weight": weight_OK}
        save_file(tensors, unfinished, metadata={"record": level.record.model_dump_json()})
        os.replace(unfinished, path)

    def load(self, site: str, label: str) -> Level:
        """A level that was saved."""
        if self._folder is None:
            return self._levels[site, label]
        with safe_open(self._file(site, label), "pt") as file:
            record = LevelRecord.model_validate_json(file.metadata()["record"])
            return Level(record, file.get_tensor("weight") if file.keys() else None)

    def _file(self, site: str, label: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{site}.{label}.safetensors"


def columns_of(columns_ND: Tensor, groups: Sequence[int]) -> Tensor:
    """The input columns of some groups, in their order, int64."""
    return columns_ND[torch.tensor(groups, dtype=torch.int64)].flatten()


class CandidateDecoder(Decoder):
    """The dense model with one level of some of its sites, in masked form: widths stay, what has gone is zero.

    labels: by the name of an output linear which of its levels; linears that are not named stay as they are.
    """

    def __init__(self, dense: Decoder, database: LevelDatabase, labels: Mapping[str, str], head_unit: HeadUnit) -> None:
        self.skeleton, self.family = dense.skeleton, dense.family
        self._dense, self._database, self._labels, self._head_unit = dense, database, labels, head_unit
        self._shapes, self._head_dim = shapes(dense.skeleton), dense.family.head_dim(dense.skeleton)

    def layer(self, index: int, device: torch.device) -> nn.Module:
        """The dense model's, with the weights of its levels."""
        layer, _, _ = self.layer_with_plan(index, device)
        return layer

    @torch.no_grad()
    def layer_with_plan(
        self, index: int, device: torch.device
    ) -> tuple[nn.Module, LayerPlan | None, tuple[SubLayerReport, ...]]:
        """The same, what is kept of it (None: nothing), and the reports of its linears."""
        layer = self._dense.layer(index, device)
        kept: list[tuple[int, ...]] = []
        reports: list[SubLayerReport] = []
        for site in self._sites(index):
            units, report = self._place_(layer, site)
            kept.append(units)
            reports.append(report)
        heads, channels = kept
        plan = layer_plan(index, self._shapes[index], heads, channels, self._head_unit)
        mask_head_norms_(self.family, layer, plan.kept_query_heads, plan.kept_kv_heads)
        return layer, plan if heads or channels else None, tuple(reports)

    def _sites(self, index: int) -> Iterator[Site]:
        return sites_of(self.family, index, self._shapes[index], self._head_dim, self._head_unit)

    def _place_(self, layer: nn.Module, site: Site) -> tuple[tuple[int, ...], SubLayerReport]:
        """Give a linear the weight of its level; returns the groups that stay, and the report."""
        total = site.num_groups
        if site.name not in self._labels:
            report = SubLayerReport(layer=site.layer, sub_layer=site.kind, name=site.name, kept=total, total=total)
            return tuple(range(total)), report
        level = self._database.load(site.name, self._labels[site.name])
        kept = level.record.kept
        if not kept:
            silence_(self.family, layer, site.kind)
        elif level.weight_OK is not None:
            weight_OI = output_linear(self.family, layer, site.kind).weight
            kept_K = columns_of(site.columns_ND, kept).to(weight_OI.device)
            weight_OI.zero_()
            weight_OI[:, kept_K] = level.weight_OK.to(weight_OI)
        return kept, level.record.report
