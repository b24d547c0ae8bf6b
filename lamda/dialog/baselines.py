"""Two simple predictors of ratings, to compare a model with: logistic regression on TF-IDF, and on length alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lamda.config.errors import UserError
from lamda.data.documents import Document
from lamda.dialog.examples import Rating, examples_in
from lamda.dialog.ratings import Ratings

CONTEXT = 3
"""Messages of the context that TF-IDF sees."""


def baselines(training: Iterable[Document], held_out: Sequence[tuple[Rating, int]]) -> dict[str, dict[str, Any]]:
    """AUC and its 95% interval of both baselines by attribute, trained on all ratings of the training conversations.

    held_out: ratings to predict, with the index of their conversation.

    Raises UserError without scikit-learn, and where an attribute has too few training ratings, or none of a class.
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
    learned = [rating for document in training for rating in examples_in(document)[1]]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(rating.kind for rating, _ in held_out):
        known = [rating for rating in learned if rating.kind == name]
        asked = [rating for rating, _ in held_out if rating.kind == name]
        conversations = np.array([number for rating, number in held_out if rating.kind == name])
        labels = [rating.rating for rating in known]
        if len(set(labels)) < 2:
            raise UserError(f"--baselines: the training files have no ratings of {name!r} with 0 and with 1")
        for baseline, model, features in (("TF-IDF", tf_idf, _texts), ("length", LogisticRegression(), _lengths)):
            try:
                model.fit(features(known), labels)
            except ValueError as error:  # such as texts that share no word
                raise UserError(f"--baselines: {baseline} cannot learn the ratings of {name!r} ({error})") from error
            scores = model.predict_proba(features(asked))[:, 1]
            ratings = Ratings(scores, np.array([rating.rating for rating in asked]), conversations)
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
