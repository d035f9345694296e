"""A causal language model that learns: a packed row in, the sum of the cross entropy over its learned places out.

tokens_1T -> embedding (NEFTune's noise, in training) -> decoder, documents apart -> hidden_1TD -> learned places only
-> head and loss, a piece at a time (`head.py`).

- Trained parameters are float32; the compute dtype comes by autocast.
- A row without a learned place gives exactly 0, and zero gradients rather than none, so that every rank takes part.
- What cannot keep documents apart is found by trying it, when the learner is made: see `prove`.

Shapes: T tokens of the row, N learned places, D hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetuner.data.batch import IGNORED, Batch
from finetuner.errors import ModelError, Problem
from finetuner.model import account, attention, compiled, save
from finetuner.model.answering import answering
from finetuner.model.head import log_probs, loss_sum, whole_log_probs, whole_loss_sum
from finetuner.model.shards import shape_of
from finetuner.model.sizes import missing
from finetuner.model.soundness import first_line


class CausalLearner(nn.Module):
    """`model` is transformers' model, or peft's around it; `stored` the dtype in which a whole model is saved."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        *,
        adapted: bool,
        attends: str,
        compute: torch.dtype,
        stored: torch.dtype,
        neftune: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.adapted, self.attends, self.compute, self.stored, self.neftune = adapted, attends, compute, stored, neftune
        self.row: int | None = None
        """Tokens of every training row, where the layers are compiled."""
        self.together = False
        """Whether every rank must go through the model for every row, as where each holds a shard of the weights."""
        self.whole: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """In its block, modules can be called that an engine gathers along with this one and not by themselves."""
        try:
            self.causal.set_attn_implementation(attends)
        except (ValueError, ImportError) as error:
            what, remedy = first_line(error), 'model.attention="eager"'
            raise ModelError(Problem("E-ATTENTION-UNFIT", what, "model.attention", attends, remedy=remedy)) from error
        self.has_plain_head = self.prove()
        if not self.trainable():
            raise ModelError(
                Problem(
                    "E-MODEL-FROZEN", "no parameter trains", "model.freeze", remedy="freeze less, or add an adapter"
                )
            )

    @property
    def causal(self) -> PreTrainedModel:
        """transformers' model, with the adapter's layers in it if there is one."""
        causal: PreTrainedModel = self.model.get_base_model() if self.adapted else self.model  # type: ignore[operator]
        return causal

    @property
    def device(self) -> torch.device:
        device: torch.device = self.causal.get_input_embeddings().weight.device
        return device

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross entropy over the learned places, a float32 scalar."""
        return self.nothing(batch) if batch.learned == 0 else self.learned(batch, each=False)

    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probability of each learned token, in the row's order: N of float32."""
        return self.nothing(batch).expand(0) if batch.learned == 0 else self.learned(batch, each=True)

    def learned(self, batch: Batch, *, each: bool) -> Tensor:
        """As `log_probs`, or as `forward`, of a row in which something is learned."""
        if self.row is not None and self.training:
            return self.at_places(compiled.fill_row(batch, self.row), each=each)
        size = sum(batch.lengths)
        with self.uncompiled():
            filled = compiled.fill_row(batch, size + missing(size, self.device, self.compute))
            return self.at_places(filled, each=each)

    def at_places(self, batch: Batch, *, each: bool) -> Tensor:
        """As `learned`, the layers compiled or not as they are now."""
        device = self.device
        targets_T = batch.targets_1T[0].to(device, non_blocking=True).long()
        # Of a size known beforehand: to ask a GPU how many places there are would wait for it.
        places_N = torch.nonzero_static(targets_T != IGNORED, size=batch.learned)[:, 0]
        targets_N = targets_T[places_N]
        with self.autocast():
            given = self.inputs(batch.tokens_1T.to(device, non_blocking=True).long(), batch)
            if not self.has_plain_head:
                logits_1NV = self.causal(**given, logits_to_keep=places_N).logits
                return (whole_log_probs if each else whole_loss_sum)(logits_1NV[0], targets_N)
            hidden_1TD = self.causal.base_model(**given).last_hidden_state
            score = log_probs if each else loss_sum
            return score(self.causal.get_output_embeddings(), hidden_1TD[0, places_N], targets_N, self.compute)

    def inputs(self, tokens_1T: Tensor, batch: Batch) -> dict[str, Any]:
        """What transformers' forward takes. Neither mask nor cache: with one, packed documents would be mixed."""
        positions_1T = batch.positions_1T.to(tokens_1T.device, non_blocking=True).long()
        documents = attention.arguments(self.attends, batch.lengths, tokens_1T.device)
        given = {"position_ids": positions_1T, "use_cache": False, **documents}
        if self.neftune is None or not self.training:
            return given | {"input_ids": tokens_1T}
        embedded_1TD = self.causal.get_input_embeddings()(tokens_1T)
        return given | {"inputs_embeds": embedded_1TD + noise(embedded_1TD, batch.lengths, self.neftune)}

    def nothing(self, batch: Batch) -> Tensor:
        """0, with a zero gradient for each trained parameter; through the model only where all ranks must."""
        if self.together:
            targets_1T = batch.targets_1T.clone()
            targets_1T[0, 0] = batch.tokens_1T[0, 0]
            return self.learned(dataclasses.replace(batch, targets_1T=targets_1T, learned=1), each=False) * 0.0
        parts = [parameter.flatten()[:1].float().sum() * 0.0 for _, parameter in self.trainable()]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def prove(self) -> bool:
        """Whether the head is a plain function of the hidden state; tries out, too, that documents are kept apart.

        Where the model asks for more than our attention does, it goes transformers' own way from here on.

        Raises: ModelError where a document comes out otherwise behind another one than at the beginning of a row.
        """
        causal = self.causal
        with self.evaluating(), self.autocast():
            try:
                apart = self.apart()
            except attention.Unserved as reason:
                self.attends = attention.instead(causal, str(reason))
                causal.set_attn_implementation(self.attends)
                apart = self.apart()
            if not apart:
                what = "packed documents would not be kept apart in this model"
                found = f"{type(causal).__name__} with attention {self.attends}"
                remedy = 'try attention="eager" or "sdpa", or another model'
                raise ModelError(Problem("E-ATTENTION-LEAK", what, "model.attention", found, remedy=remedy))
            if causal.base_model is causal:
                return False
            given = self.trial()
            logits_1TV = causal.get_output_embeddings()(causal.base_model(**given).last_hidden_state)
            return bool(torch.equal(logits_1TV, causal(**given).logits))

    def apart(self) -> bool:
        """Whether documents move neither each other nor each other's positions: the same in both places of a row."""
        one_1TV, other_1TV = (self.causal(**self.trial(turned=turned)).logits for turned in (False, True))
        return not moved(one_1TV[:, 3:], other_1TV[:, :3], self.compute)

    def trial(self, *, turned: bool = False) -> dict[str, Any]:
        """What the model takes for a row of two documents of three words, or the other one first."""
        embedding, device = self.causal.get_input_embeddings(), self.device
        # From the middle of the vocabulary: at its ends stand tokens that may be nothing to the model, as padding is.
        tokens_1T = (
            torch.arange(6, device=device)[None].roll(3 if turned else 0, 1) + shape_of(embedding.weight)[0] // 2
        )
        positions_1T = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
        given = {"input_ids": tokens_1T, "position_ids": positions_1T, "use_cache": False}
        return given | attention.arguments(self.attends, (3, 3), device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32)

    def compile_for(self, row: int, backend: str = "inductor") -> None:
        """Compiles the decoder layers for training rows, which are filled up to `row` tokens from here on."""
        compiled.compile_layers(self.causal, self.attends, row, backend)
        self.row = row

    def uncompiled(self) -> AbstractContextManager[None]:
        """In the block, compiled layers run as they were written."""
        return contextlib.nullcontext() if self.row is None else torch.compiler.set_stance("force_eager")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode in the block; then each module's own mode again, frozen parts included."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def answering(self) -> Iterator[PreTrainedModel]:
        """transformers' model ready to generate: evaluation mode, an attention that takes a cache; then as before."""
        with self.uncompiled(), self.whole(), answering(self, self.causal, self.compute):
            yield self.causal

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that train, by name; tied ones once."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def dtype_table(self) -> tuple[tuple[str, str], ...]:
        """What each part is held and computed in: (("frozen base", "nf4"), ..., ("compute", "bfloat16"))."""
        return account.dtype_table(self.model, self.causal, self.compute)

    def what_trains(self) -> account.Trains:
        """Numbers of parameters: trained, and in all."""
        return account.what_trains(self.model)

    def masters(self) -> dict[str, Tensor]:
        """The float32 values of what trains, by name: what a checkpoint keeps so that resuming loses no bit."""
        return {name: parameter.detach() for name, parameter in self.trainable()}

    @torch.no_grad()
    def load_masters(self, values: Mapping[str, Tensor]) -> None:
        """Takes values that `masters` gave, each by its name.

        Raises: ModelError where names or shapes differ.
        """
        own = self.masters()
        wrong = sorted(own.keys() ^ values.keys())
        wrong += [name for name in own.keys() & values.keys() if own[name].shape != values[name].shape]
        if wrong:
            what, remedy = "the checkpoint's weights are not this model's", "resume with the config that wrote them"
            raise ModelError(Problem("E-MASTERS", what, found=", ".join(wrong[:4]), remedy=remedy))
        for name, parameter in own.items():
            parameter.copy_(values[name])

    def changing(self) -> dict[str, Tensor]:
        """What training may change of what `save` writes, by name: the live tensors, `masters` among them."""
        return save.changing(self.model, adapted=self.adapted)

    def save(self, folder: Path) -> None:
        """Writes a folder that transformers, or peft, loads: weights, tokenizer, template, generation config."""
        self.saver(self.changing())(folder)

    def saver(self, values: Mapping[str, Tensor]) -> Callable[[Path], None]:
        """What does as `save` with these `values` of `changing`, at any time and in any thread.

        If they are copies, nothing that training or answering does meanwhile is seen in the folder.
        """
        still, beside = save.still(self.model, adapted=self.adapted), self.beside
        own = {} if self.adapted else save.own_tensors(self.model)

        def write(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            if self.adapted:
                save.adapter(still, folder, values)
            else:
                save.whole(still, folder, self.stored, values, own)
            for name, data in beside.items():
                (folder / name).write_bytes(data)
            save.readable(folder)

        return write

    @functools.cached_property
    def beside(self) -> Mapping[str, bytes]:
        """The files beside the weights, by name. Made once: they are always the same, and no thread must make them
        while another asks the tokenizer."""
        return save.beside(self.causal, self.tokenizer)


def moved(one_1TV: Tensor, other_1TV: Tensor, dtype: torch.dtype) -> bool:
    """Whether a place differs by more than rounding: another document in a kernel's group may cost a last bit."""
    one, other = one_1TV.float(), other_1TV.float()
    apart_1T = (one - other).norm(dim=-1) / one.norm(dim=-1)
    return bool((apart_1T > torch.finfo(dtype).eps ** 0.625).any())


def noise(embedded_1TD: Tensor, lengths: tuple[int, ...], alpha: float) -> Tensor:
    """NEFTune's uniform noise of a document of L tokens: alpha / sqrt(L D) (arXiv:2310.05914, algorithm 1)."""
    size = embedded_1TD.shape[-1]
    bounds = torch.tensor([alpha / (length * size) ** 0.5 for length in lengths])
    bounds_T = bounds.repeat_interleave(torch.tensor(lengths)).to(embedded_1TD.device, embedded_1TD.dtype)
    return torch.empty_like(embedded_1TD).uniform_(-1, 1) * bounds_T[None, :, None]
