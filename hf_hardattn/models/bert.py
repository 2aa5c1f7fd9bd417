"""BERT."""

from ._bert import bert_like

BERT = bert_like("bert", "Bert")
