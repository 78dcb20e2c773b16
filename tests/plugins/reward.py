"""A reward that reads token ids and whether the answer ended by itself, and measures more than the score."""


def brevity(prompts, answers, *, samples, **columns):
    """1 for an answer that ended, less a tenth for each token."""
    return [
        {
            "score": float(sample.ended) - len(sample.answer_ids) / 10,
            "ended": float(sample.ended),
            "distinct_tokens": len(set(sample.answer_ids)) / len(sample.answer_ids),
        }
        for sample in samples
    ]
