"""Prompts that carry weights, or are longer than the text encoder reads at once: by compel, in chunks of 75 tokens.

What a plain prompt becomes here is what the stock pipeline makes of it.
"""

from dataclasses import replace
from typing import Any

import pyparsing
import torch
from compel import Compel
from compel.embeddings_provider import EmbeddingsProvider

from farm.errors import RenderFailed
from farm.spec import Spec

# without it compel takes four times as long for each bracket inside another: 18 s for six, on one core
pyparsing.ParserElement.enable_packrat()

Encoded = dict[str, torch.Tensor]  # text (1, tokens, width); pooled (1, width) where the family has it


class _Layer(EmbeddingsProvider):  # type: ignore[misc]
    """Takes the layer that the stock pipelines take, clip_skip included."""

    def __init__(
        self, tokenizer: Any, encoder: Any, *, clip_skip: int | None, from_end: int, cut: bool
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=encoder,
            truncate=cut,
            dtype_for_device_getter=lambda _: encoder.dtype,
        )
        self._clip_skip = clip_skip
        self._from_end = from_end  # of SDXL: never the last layer, and not normalized

    def _encode_token_ids_to_embeddings(
        self, token_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        output = self.text_encoder(token_ids, attention_mask, output_hidden_states=True, return_dict=True)
        if (most := len(output.hidden_states) - self._from_end) < (self._clip_skip or 0):
            raise RenderFailed(
                f"clip_skip is {self._clip_skip}, and this text encoder has {most} layers to leave out"
            )
        hidden: torch.Tensor
        if self._from_end == 2:
            hidden = output.hidden_states[-((self._clip_skip or 0) + 2)]
        elif self._clip_skip is None:
            hidden = output.last_hidden_state
        else:
            encoder: Any = self.text_encoder
            inner = getattr(encoder, "text_model", encoder)  # transformers 5 has one layer less
            hidden = inner.final_layer_norm(output.hidden_states[-(self._clip_skip + 1)])
        return hidden

    def _get_token_ranges_for_fragments(
        self, chunked_and_padded_token_ids: list[int], fragments: list[str]
    ) -> list[tuple[int, int]]:
        """Of a fragment without words no token at all: compel stumbles over those of weights below one."""
        found = super()._get_token_ranges_for_fragments(chunked_and_padded_token_ids, fragments)
        return [(0, -1) if first is None else (first, last) for first, last in found]


class Words:
    """The text encoders of a pipeline, for such prompts."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        second = getattr(pipe, "text_encoder_2", None)
        self._encoders = [(pipe.tokenizer, pipe.text_encoder)]
        if second is not None:
            self._encoders.append((pipe.tokenizer_2, second))

    def pair(self, spec: Spec) -> tuple[Encoded, Encoded]:
        """The prompt and the negative one, of one length.

        Raises RenderFailed if a prompt's weights cannot be read.
        """
        plain = replace(spec, clip_skip=None)  # as in the stock pipelines: it is the prompt's alone
        positive, negative = self.encode(spec.prompt, spec), self.encode(spec.negative_prompt, plain)
        short, long = sorted((positive, negative), key=lambda e: e["text"].shape[1])
        if (missing := long["text"].shape[1] - short["text"].shape[1]) > 0:
            empty = self.encode("", spec if short is positive else plain)["text"]
            short["text"] = torch.cat([short["text"], *[empty] * (missing // empty.shape[1])], dim=1)
        if not spec.negative_prompt and self._pipe.config.get("force_zeros_for_empty_prompt"):
            negative = {name: torch.zeros_like(t) for name, t in negative.items()}
        return positive, negative

    def encode(self, text: str, spec: Spec) -> Encoded:
        two = len(self._encoders) > 1
        cut = not (spec.long_prompt or spec.prompt_weights)
        providers = [
            _Layer(tokenizer, encoder, clip_skip=spec.clip_skip, from_end=2 if two else 1, cut=cut)
            for tokenizer, encoder in self._encoders
        ]
        encoded = {"text": torch.cat([self._through(p, text, spec) for p in providers], dim=-1)}
        if two:
            plain = self._plain(text) if spec.prompt_weights else text
            encoded["pooled"] = self._pipe.encode_prompt(plain, do_classifier_free_guidance=False)[2]
        return encoded

    def _through(self, provider: _Layer, text: str, spec: Spec) -> torch.Tensor:
        embedded: torch.Tensor
        if not spec.prompt_weights:
            embedded = provider.get_embeddings_for_weighted_prompt_fragments(
                [[text]], [[1.0]], device=provider.device
            )
            return embedded
        reader = Compel(provider.tokenizer, provider.text_encoder, truncate_long_prompts=False)
        reader.conditioning_provider = provider
        try:
            embedded = reader.build_conditioning_tensor(text)
        except Exception as e:
            if isinstance(e, RuntimeError) and not isinstance(e, RecursionError):  # of torch
                raise
            raise RenderFailed(f"the prompt's weights cannot be read: {e}") from None
        return embedded

    @staticmethod
    def _plain(text: str) -> str:
        """The words without their weights."""
        conjunction = Compel.parse_prompt_string(text)
        parts = [getattr(c, "text", "") for p in conjunction.prompts for c in getattr(p, "children", ())]
        return " ".join(part for part in parts if part)
