"""Exact distributions over subsets of positions, and the noise to draw from them.

``PlackettLuce``          picks one position after the other, by a softmax over those that remain (Gumbel-top-k samples from it).
``ConditionalBernoulli``  p(S) is proportional to exp(sum of the scores in S), |S| = k (the distribution that SIMPLE differentiates).

They are different distributions (total variation about 0.14 on ten normal scores with k = 5), so an unbiased score-function
estimator must draw from the one whose log-probability it uses. Rows with k = 0 or k >= valid count have no choice: they
keep nothing or everything valid, with log-probability 0, entropy 0 and a gradient that is exactly zero (not rounding
noise, which Adam would scale up).
"""

from .conditional_bernoulli import ConditionalBernoulli
from .plackett_luce import PlackettLuce
from .subset import LOW, SubsetLaw, gumbel_noise

__all__ = ["LOW", "ConditionalBernoulli", "PlackettLuce", "SubsetLaw", "gumbel_noise"]
