"""What can be told from an embedding of cells that was never told it: batches, cell types, perturbations; beside as many principal components."""

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from perturbflow.models.latent import Latent
from perturbflow.pairs import Pairs

MAX_CELLS = 4000
MAX_LABELS = 30  # the commonest
N_NEIGHBOURS = 15
N_FOLDS = 3


def separability(pairs: Pairs, latent: Latent, seed: int) -> dict[str, dict[str, float]]:
    """Return how well classifiers tell cells apart, by obs column.

    Balanced accuracy of a logistic regression (linear probe) and of the 15 nearest neighbours, cross-validated over cells, in the latent space and
    in principal components of the same number and cells; beside it chance, 1 / number of labels. At most 30 labels and 4,000 cells, controls
    left out of perturbations. A column with one label is left out.
    """
    found = {}
    for column in ("batch", "cell_type", "perturbation"):
        labels = pairs.obs[column].to_numpy(str)
        usable = np.flatnonzero(~pairs.is_control) if column == "perturbation" else np.arange(len(labels))
        rows = np.random.default_rng(seed).permutation(usable)
        shown = pd.Series(labels[rows]).value_counts().index[:MAX_LABELS]
        rows = np.sort(rows[np.isin(labels[rows], shown.to_numpy(str))][:MAX_CELLS])
        n_cells = pd.Series(labels[rows]).value_counts()
        commonest = n_cells.index[n_cells >= N_NEIGHBOURS].to_numpy(str)
        if len(commonest) < 2:
            continue
        rows = rows[np.isin(labels[rows], commonest)]
        X = pairs.X[rows].toarray()
        n_components = min(latent.n_dimensions, X.shape[1], len(X) - 1)
        spaces = {"embedding": latent.encode(X), "pca": PCA(n_components, random_state=0).fit_transform(X)}
        found[column] = {"n_labels": len(commonest), "n_cells": len(rows), "chance": round(1 / len(commonest), 4)}
        for space, z in spaces.items():
            for name, classifier in (("linear", LogisticRegression(max_iter=200)), ("knn", KNeighborsClassifier(N_NEIGHBOURS))):
                folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0)
                told = cross_val_predict(make_pipeline(StandardScaler(), classifier), z, labels[rows], cv=folds)
                found[column][f"{space}_{name}"] = round(float(balanced_accuracy_score(labels[rows], told)), 4)
    return found
