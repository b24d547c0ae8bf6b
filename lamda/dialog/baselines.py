"""Two simple predictors of ratings, to compare a model with: logistic regression on TF-IDF, and on length alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lamda.config.errors import UserError
from lamda.data.held_out import HeldOut
from lamda.dialog.examples import Rating, examples_in
from lamda.dialog.ratings import Ratings

if TYPE_CHECKING:
    from lamda.dialog.evaluation import EvalExample

CONTEXT = 3
"""Messages of the context that TF-IDF sees."""


def baselines(training: HeldOut, held_out: Sequence[EvalExample]) -> dict[str, dict[str, Any]]:
    """AUC and its 95% interval of both baselines by attribute, trained on all ratings of the training conversations.

    Raises UserError without scikit-learn, and where an attribute has no training ratings of both classes.
    """
    try:
        from sklearn.compose import make_column_transformer
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise UserError(f"--baselines needs scikit-learn ({error}); pip install 'lamda-pytorch[eval]'") from error

    words = {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True}
    columns = make_column_transformer((TfidfVectorizer(**words), 0), (TfidfVectorizer(**words), 1))
    tf_idf = make_pipeline(columns, LogisticRegression(max_iter=1000))
    learned = [rating for document in training.documents() for rating in examples_in(document)[1]]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(each.source.kind for each in held_out if isinstance(each.source, Rating)):
        known = [rating for rating in learned if rating.kind == name]
        asked = [each for each in held_out if each.source.kind == name]
        labels = [rating.rating for rating in known]
        if len(set(labels)) < 2:
            raise UserError(f"--baselines: the training files have no ratings of {name!r} with 0 and with 1")
        sources = [each.source for each in asked if isinstance(each.source, Rating)]
        conversations = np.array([each.conversation for each in asked])
        for baseline, model, features in (("TF-IDF", tf_idf, _texts), ("length", LogisticRegression(), _lengths)):
            model.fit(features(known), labels)
            scores = model.predict_proba(features(sources))[:, 1]
            ratings = Ratings(scores, np.array([source.rating for source in sources]), conversations)
            figures = {"auc": ratings.metrics()["auc"], "auc_interval": ratings.auc_interval()}
            found.setdefault(name, {})[baseline] = figures
    return found


def _texts(ratings: Sequence[Rating]) -> np.ndarray[Any, Any]:
    """[n, 2]: the end of the context, and the response."""
    pairs = [("\n".join(message.content for message in each.context[-CONTEXT:]), each.response) for each in ratings]
    return np.array(pairs, dtype=object)


def _lengths(ratings: Sequence[Rating]) -> np.ndarray[Any, Any]:
    """[n, 1]: the logarithm of the number of words."""
    return np.log1p([[len(each.response.split())] for each in ratings])
