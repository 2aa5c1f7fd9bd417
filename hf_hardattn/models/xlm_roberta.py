"""XLM-RoBERTa."""

from ._bert import bert_like

XLM_ROBERTA = bert_like("xlm_roberta", "XLMRoberta")
