"""Hugging Face's Trainer fine-tunes a tiny BERT to tell what a sentence is about.

An ordinary training script: it knows nothing of esper-otel, and needs no callback under
``esper-otel run``. Nothing is fetched: the model starts from random weights, its
vocabulary is made here, and the sentences are those behind ``help("topics")``.

    python -m examples.finetune [--steps 200] [--seed 0]
"""

import argparse
import os
import re
import tempfile
from collections import Counter
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from examples.fingerprint import fingerprint

SUBJECTS = 6
LONGEST = 48


def sentences() -> list[tuple[str, int]]:
    """Sentences of the longest topics, each with the number of its topic."""
    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))[:SUBJECTS]
    return [
        (sentence, subject)
        for subject, name in enumerate(longest)
        for sentence in re.split(r"(?<=\.)\s+|\n\n", topics[name])
        if len(sentence.split()) > 4
    ]


def own_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Takes the 2,000 most frequent words of ``texts`` for words, and no others."""
    splitting = pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word for text in texts for word, _ in splitting.pre_tokenize_str(text.lower())
    )
    # A vocabulary that tokenizers trains differs from run to run: its threads race.
    words = ["[PAD]", "[UNK]", *(word for word, _ in counts.most_common(2000))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitting
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of sentences whose subject is told right."""
    right = np.argmax(prediction.predictions, 1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    set_seed(options.seed)
    told = sentences()
    tokenizer = own_tokenizer([text for text, _ in told])
    examples = [
        tokenizer(text, truncation=True, max_length=LONGEST) | {"labels": subject}
        for text, subject in told
    ]
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=LONGEST,
            num_labels=SUBJECTS,  # type: ignore[call-arg]
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=64,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                warmup_steps=options.steps // 10,
                seed=options.seed,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                log_level="error",
            ),
            train_dataset=[e for i, e in enumerate(examples) if i % 5],
            eval_dataset=examples[::5],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.4f}")
    losses = [told["loss"] for told in trainer.state.log_history if "loss" in told]
    print(fingerprint(model, losses))


if __name__ == "__main__":
    main()
