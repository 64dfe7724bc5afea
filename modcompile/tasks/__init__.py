"""Tasks that models are compared on: labelled texts from files that a user has, and our own constructions from WordNet.

``published`` reads the files of SNLI, MNLI and GLUE, ``squad`` those of SQuAD, ``newsgroups`` 20 Newsgroups;
``constructed`` makes tasks of WordNet's files, which ``wordnet`` reads. ``encode`` turns examples into batches of a
model, and ``scores`` says how good answers are. Nothing is downloaded.
"""

__all__ = ["PUBLISHED", "Answer", "EncodedBatch", "Labelled", "Question", "Rated", "Task", "WordNet", "accuracy",
           "answer_spans", "encode", "exact_match", "newsgroups", "overlap", "read_published", "read_squad", "spearman",
           "wordnet_entailment", "wordnet_questions", "wordnet_similarity"]

from modcompile.tasks.constructed import wordnet_entailment, wordnet_questions, wordnet_similarity
from modcompile.tasks.encode import EncodedBatch, answer_spans, encode
from modcompile.tasks.example import Answer, Labelled, Question, Rated, Task
from modcompile.tasks.newsgroups import newsgroups
from modcompile.tasks.published import PUBLISHED, read_published
from modcompile.tasks.scores import accuracy, exact_match, overlap, spearman
from modcompile.tasks.squad import read_squad
from modcompile.tasks.wordnet import WordNet
