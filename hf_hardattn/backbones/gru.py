"""A GRU encoder-decoder with attention, in Transformers' form: the recurrent backbone.

By itself, it uses full attention; hard attention is applied to it as to any other family (``models/gru.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput


class GruConfig(PreTrainedConfig):
    """Sizes of a ``GruForConditionalGeneration``.

    Args:
        vocab_size: vocabulary size of source and target. d_model: width D of all states, an even number.
        num_layers: number of bidirectional GRU layers; 0 reads the source rows as they are (such as features of image patches).
        num_decoder_layers: number of GRU layers. num_attention_heads: H; 1 is the classic attention.
        feature_size: width of the rows given as ``inputs_embeds``; None if the source consists of tokens.
        dropout: in [0, 1).
    """

    model_type = "hardattn_gru"
    attribute_map = {"hidden_size": "d_model"}

    def __init__(
        self,
        vocab_size: int = 1000,
        d_model: int = 128,
        num_layers: int = 1,
        num_decoder_layers: int = 1,
        num_attention_heads: int = 1,
        feature_size: int | None = None,
        dropout: float = 0.1,
        pad_token_id: int = 0,
        eos_token_id: int = 1,
        decoder_start_token_id: int = 0,
        is_encoder_decoder: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        if d_model % 2 or d_model % num_attention_heads:
            raise ValueError(
                f"d_model={d_model} does not fit num_attention_heads={num_attention_heads}; d_model is split between the two directions of "
                "the encoder, and among the heads. Use an even multiple of the number of heads."
            )
        self.vocab_size, self.d_model = vocab_size, d_model
        self.num_layers, self.num_decoder_layers = num_layers, num_decoder_layers
        self.num_hidden_layers = 1  # for the generation cache: one layer reads the source
        self.num_attention_heads, self.feature_size, self.dropout = num_attention_heads, feature_size, dropout
        kwargs |= {"pad_token_id": pad_token_id, "eos_token_id": eos_token_id, "is_encoder_decoder": is_encoder_decoder}
        kwargs |= {"decoder_start_token_id": decoder_start_token_id, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)


class GruEncoderLayer(nn.Module):
    """A bidirectional GRU over the valid rows of each example; the output is zero at all other rows."""

    def __init__(self, config: GruConfig):
        super().__init__()
        self.gru = nn.GRU(config.d_model, config.d_model // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Map rows ``[B, N, D]`` with a mask, bool ``[B, N]``, to ``[B, N, D]``."""
        if mask is None:
            return self.dropout(self.gru(hidden)[0])
        order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., None]  # valid rows first, in their order
        rows = hidden.gather(1, order.expand_as(hidden))
        lengths = mask.sum(-1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
        output, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], True, total_length=hidden.shape[1])
        output = torch.zeros_like(output).scatter(1, order.expand_as(output), output)
        return self.dropout(output.masked_fill(~mask.unsqueeze(-1), 0.0))


class GruAttention(nn.Module):
    """Scaled dot-product attention from the decoder's states to the source."""

    def __init__(self, config: GruConfig):
        super().__init__()
        self.config, self.heads, self.head_dim = (
            config,
            config.num_attention_heads,
            config.d_model // config.num_attention_heads,
        )
        self.scaling, self.attention_dropout, self.layer_idx = self.head_dim**-0.5, 0.0, 0
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def split(self, states: Tensor) -> Tensor:
        """Split the heads: ``[B, N, D]`` to ``[B, H, N, d]``."""
        return states.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def forward(
        self, hidden: Tensor, source: Tensor, mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from queries ``[B, Q, D]`` to the source ``[B, N, D]``, under a mask, bool ``[B, 1, 1, N]``.

        Returns:
            ``[B, Q, D]``, and weights ``[B, H, Q, N]`` if requested.
        """
        query = self.split(self.q_proj(hidden))
        store = None if past_key_values is None else past_key_values.cross_attention_cache
        if store is not None and past_key_values.is_updated.get(self.layer_idx):
            key, value = store.layers[self.layer_idx].keys, store.layers[self.layer_idx].values
        else:
            key, value = self.split(self.k_proj(source)), self.split(self.v_proj(source))
            if store is not None:
                key, value = store.update(key, value, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
        if kwargs.get("output_attentions"):
            logits = query @ key.transpose(-1, -2) * self.scaling
            weights = (logits if mask is None else logits.masked_fill(~mask, torch.finfo(logits.dtype).min)).softmax(-1)
            output = weights @ value
        else:
            weights = None
            output = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=self.scaling)
        return self.o_proj(output.transpose(1, 2).flatten(2)), weights


class GruReader(GradientCheckpointingLayer):
    """Combines the decoder's state with what it has read from the source: ``tanh(W [state; read])``."""

    def __init__(self, config: GruConfig):
        super().__init__()
        self.attention = GruAttention(config)
        self.combine = nn.Linear(2 * config.d_model, config.d_model)

    def forward(
        self,
        hidden: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        read, weights = self.attention(
            hidden, encoder_hidden_states, encoder_attention_mask, past_key_values=past_key_values, **kwargs
        )
        return self.combine(torch.cat((hidden, read), -1)).tanh(), weights


class GruPreTrainedModel(PreTrainedModel):
    config_class = GruConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["GruEncoderLayer", "GruReader"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                if name.startswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.xavier_uniform_(parameter)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)


class GruEncoder(GruPreTrainedModel):
    """Encodes tokens or given rows to states ``[B, N, D]``, with all-zero rows where the mask is 0."""

    def __init__(self, config: GruConfig):
        super().__init__(config)
        if config.feature_size is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        else:
            self.project = nn.Linear(config.feature_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([GruEncoderLayer(config) for _ in range(config.num_layers)])
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        if self.config.feature_size is None:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        elif inputs_embeds is None:
            raise ValueError(
                f"feature_size={self.config.feature_size} needs rows of features, but inputs_embeds is None; pass inputs_embeds "
                "[B, N, feature_size], or input_ids with a config that has feature_size=None."
            )
        else:
            hidden = self.project(inputs_embeds)
        mask = None if attention_mask is None else attention_mask.bool()
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask, **kwargs)
        if mask is not None:
            hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
        return BaseModelOutput(last_hidden_state=hidden)


class GruDecoder(GruPreTrainedModel):
    """Encodes the target's past with a GRU; each state then reads the source by attention, which is its only access to the source.

    No state depends on what an earlier one read (no input feeding), so a latent alignment can be summed over exactly.
    """

    def __init__(self, config: GruConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.initial = nn.Parameter(torch.zeros(config.num_decoder_layers, 1, config.d_model))
        self.gru = nn.GRU(config.d_model, config.d_model, config.num_decoder_layers, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([GruReader(config)])
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map ids ``[B, T]``, the source ``[B, N, D]`` and its mask, bool ``[B, N]``, to ``[B, T, D]`` and, if requested, weights."""
        states = None if past_key_values is None else past_key_values.self_attention_cache
        if states is not None and states.get_seq_length():
            state = states.layers[0].keys[:, :, -1].transpose(0, 1)
        else:
            state = self.initial.repeat(1, len(input_ids), 1)
        hidden, last = self.gru(self.dropout(self.embed_tokens(input_ids)), state.contiguous())
        if states is not None:  # the state of a step is cached like a key, so that beam search reorders it too
            kept = last.transpose(0, 1).unsqueeze(2).expand(-1, -1, input_ids.shape[1], -1)
            states.update(kept, kept[..., :0], 0)
        hidden, weights = self.dropout(hidden), None
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            hidden, weights = layer(hidden, encoder_hidden_states, mask, past_key_values=past_key_values, **kwargs)
        return self.dropout(hidden), weights


class GruForConditionalGeneration(GruPreTrainedModel, GenerationMixin):
    """GRU encoder-decoder with attention (Luong et al. 2015, arXiv:1508.04025, global attention, dot score, no input feeding)."""

    def __init__(self, config: GruConfig):
        super().__init__(config)
        self.encoder, self.decoder = GruEncoder(config), GruDecoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels ``[B, T]`` right, after the start token; -100 becomes padding."""
        shifted = labels.new_full(labels.shape, self.config.decoder_start_token_id)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Predict the target.

        Args:
            input_ids: int64 ``[B, N]``, or inputs_embeds: ``[B, N, feature_size]``. attention_mask: ``[B, N]``, 1 = valid.
            decoder_input_ids: int64 ``[B, T]``; made from ``labels`` if None. labels: int64 ``[B, T]``, -100 where there is none.

        Returns:
            ``Seq2SeqLMOutput`` with logits ``[B, T, vocab_size]``; the loss is the mean over labels.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, **kwargs)
        source = encoder_outputs[0]
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = None if attention_mask is None else attention_mask.bool()
        hidden, weights = self.decoder(
            decoder_input_ids, source, mask, past_key_values, output_attentions=output_attentions, **kwargs
        )
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            cross_attentions=None if weights is None else (weights,),
            encoder_last_hidden_state=source,
        )
        return output if return_dict is not False else output.to_tuple()


AutoConfig.register("hardattn_gru", GruConfig)
AutoModelForSeq2SeqLM.register(GruConfig, GruForConditionalGeneration)
