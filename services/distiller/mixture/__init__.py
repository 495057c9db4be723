"""A Dirichlet-process mixture, fitted by variational Bayes.

An iteration is two matrix products, for any number of points.
"""

from services.distiller.mixture.estimator import DirichletProcessMixture

__all__ = ["DirichletProcessMixture"]
