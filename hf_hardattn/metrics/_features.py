"""The inputs of the metrics, as columns of ``evaluate``."""

from datasets import Features, Sequence, Value

CHOICES = Features({"predictions": Sequence(Value("int8")), "references": Sequence(Value("int8"))})
SCORES = Features({"predictions": Sequence(Value("float32")), "references": Sequence(Value("float32"))})
SCORES_AND_CHOICES = Features({"predictions": Sequence(Value("float32")), "references": Sequence(Value("int8"))})
CURVES = Features({"predictions": Sequence(Value("float32")), "references": Value("float32")})
PROBABILITIES = Features({"predictions": Value("float32"), "references": Value("float32")})
