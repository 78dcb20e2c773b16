"""A reward that reads token ids and whether the response ended by itself, and returns more numbers than the score."""


def brevity(prompts, answers, *, samples, **columns):
    """1 for a response that ended, minus 0.1 for each token."""
    return [
        {
            "score": float(sample.ended) - len(sample.answer_ids) / 10,
            "ended": float(sample.ended),
            "distinct_tokens": len(set(sample.answer_ids)) / len(sample.answer_ids),
        }
        for sample in samples
    ]
