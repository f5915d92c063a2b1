"""A synthetic Llama-2 style tokenizer for tiny checkpoints (`prismo.testing.tiny`).

Llama-2's own vocabulary may not be redistributed, so this one is made up, but whatever OpenVLA relies on is the same:
normaliser and decoder, 32,000 ids and `<PAD>`, the byte tokens, the lone space 29871, 256 single characters at the end
of the vocabulary, and the true ids of the prompt's words, so that the published prompt ids come out exactly.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from prismo.util.files import write_json

VOCABULARY = 32000
PAD_ID = 32000
_SPACE = "▁"  # stands for a space inside pieces, as in SentencePiece
_FIRST_LETTER = 29872
_ACTION_IDS = range(VOCABULARY - 256, VOCABULARY)

# Pieces with their Llama-2 ids. Words begin with a space; the last three occur inside words only.
_WORDS = {
    " to": 304, " the": 278, " and": 322, " r": 364, " it": 372, " on": 373, " In": 512, " up": 701, " should": 881,
    " between": 1546, " What": 1724, " place": 2058, " take": 2125, " action": 3158, " black": 4628, " pick": 5839,
    " bow": 12580, " plate": 15284, " robot": 19964,
}  # fmt: skip
_INNER = {"ame": 420, "Out": 3744, "kin": 9089}
_LETTERS = {"l": 29880, ":": 29901, "?": 29973}
_ALPHABET = "etainorsldhcumpgfbywvkxzjqABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;!'\"()[]{}<>-_+*/\\=@#$%&^~`|"


def write_tiny_tokenizer(folder: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "processor_class": "PrismaticProcessor",
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "added_tokens.json", {"<PAD>": PAD_ID})


def build_tokenizer() -> Tokenizer:
    """The tokenizer as a `tokenizers` object: byte-pair encoding with byte fallback over the whole text at once."""
    ids, merges = _pieces()
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>", "<PAD>")]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary (piece -> id, all 32,000) and merges in order of priority."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    ids |= {word.replace(" ", _SPACE): number for word, number in _WORDS.items()} | _INNER
    ids |= {_SPACE: _FIRST_LETTER - 1} | _LETTERS
    ids |= {chr(0x4E00 + i): number for i, number in enumerate(_ACTION_IDS)}  # CJK: no case, no composition
    taken = set(ids.values())
    merges: list[tuple[str, str]] = []
    free = (number for number in range(259, VOCABULARY) if number not in taken)
    # Words first: their merges start at the space, so no inner piece can take letters away from them.
    for piece in sorted((p for p in ids if p[0] == _SPACE and len(p) > 1), key=len) + list(_INNER):
        for end in range(2, len(piece) + 1):
            merge = (piece[: end - 1], piece[end - 1])
            if merge not in merges:
                merges.append(merge)
            if piece[:end] not in ids:
                ids[piece[:end]] = next(free)
    # Letters where Llama has its single characters, then pieces that no merge can ever produce.
    letters = (number for number in range(_FIRST_LETTER, _ACTION_IDS.start) if number not in taken)
    ids |= {letter: next(letters) for letter in _ALPHABET if letter not in ids}
    unused = set(range(VOCABULARY)) - set(ids.values())
    return ids | {f"<unused_{number}>": number for number in sorted(unused)}, merges
