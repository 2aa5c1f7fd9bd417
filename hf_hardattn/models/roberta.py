"""RoBERTa."""

from ._bert import bert_like

ROBERTA = bert_like("roberta", "Roberta")
