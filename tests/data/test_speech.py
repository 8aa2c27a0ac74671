"""From waves to batches: features against a slow reference, sequences of digits, manifests, masks, buckets."""

import math

import numpy as np
import pytest
import torch

from tameformer.data import SampleKeys
from tameformer.data.augment.spectrum import SpecAugment
from tameformer.data.buckets import TokenBuckets
from tameformer.data.log_mel import FLOOR, LogMel
from tameformer.data.manifest import Manifest
from tameformer.data.speech import SpeechSource
from tameformer.data.spoken_digits import DIGITS, DigitSequences, hold_out, spoken_digits
from tameformer.data.tokenizers import CharTokenizer
from tameformer.data.utterances import all_keys, alphabet
from tameformer.errors import DataError

RATE = 1000


def keys(*indices, seed=0, epoch=0):
    return SampleKeys(seed, epoch, np.array(indices, dtype=np.int64))


@pytest.fixture
def archive(tmp_path):
    """Two speakers say each digit three times, the last time for the test; a digit is a tone of its own."""
    label, speaker, index = (part.ravel() for part in np.mgrid[0:10, 0:2, 0:3])
    sizes = 150 + 10 * index + speaker
    waves = [8000 * np.sin(2 * np.pi * 40 * (d + 1) * np.arange(n) / RATE) for d, n in zip(label, sizes, strict=True)]
    file = tmp_path / "digits.npz"
    np.savez(
        file,
        audio=np.concatenate(waves).astype(np.int16),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        label=label.astype(np.uint8),
        speaker=speaker,
        is_test=index == 2,
        sample_rate=RATE,
    )
    return file


def test_features_are_those_of_a_slow_loop():
    features = LogMel(sample_rate=RATE, num_mels=6, window_seconds=0.03, hop_seconds=0.01)
    wave = torch.randn(95, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    size, window, hop = 32, 30, 10
    assert (features.window, features.hop) == (window, hop)
    # As published: a Hann window in the middle of each stretch, the squared magnitudes of its transform, triangles.
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = [700 * (10 ** (top * i / 7 / 2595) - 1) for i in range(8)]
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * i / window) for i in range(window)]
    rows = []
    for row in range(len(wave) // hop + 1):
        power = []
        for frequency in range(size // 2 + 1):
            total = 0j
            for i in range(window):
                place = row * hop - size // 2 + (size - window) // 2 + i
                if 0 <= place < len(wave):
                    angle = -2 * math.pi * frequency * ((size - window) // 2 + i) / size
                    total += hann[i] * float(wave[place]) * complex(math.cos(angle), math.sin(angle))
            power.append(abs(total) ** 2 / sum(hann) ** 2)
        bands = []
        for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
            hertz = [frequency * RATE / size for frequency in range(size // 2 + 1)]
            weights = [max(0.0, min((f - low) / (middle - low), (high - f) / (high - middle))) for f in hertz]
            bands.append(math.log(max(FLOOR, sum(w * p for w, p in zip(weights, power, strict=True)))))
        rows.append(bands)
    expected = torch.tensor(rows, dtype=torch.float64)
    expected = (expected - expected.mean(0)) / expected.std(0, correction=0)
    assert features.num_frames(np.array([95])).tolist() == [len(expected)]
    torch.testing.assert_close(features(wave), expected, rtol=0, atol=1e-9)


def test_silence_has_features_and_too_many_bands_are_refused():
    assert not LogMel(sample_rate=8000)(torch.zeros(400)).any()
    with pytest.raises(
        ValueError, match="num_mels 80 is too many for windows of 25 samples: band 0 holds no frequency"
    ):
        LogMel(sample_rate=1000, num_mels=80)


def test_sequences_are_recordings_of_one_speaker_with_pauses(archive):
    train = spoken_digits(archive, "train", num_samples=50, longest=3)
    assert len(train.labels) == 40
    assert len(spoken_digits(archive, "test", num_samples=5).labels) == 20
    every = all_keys(train, 4, 2)
    waves, texts, lengths = train.waves(every), train.texts(every), train.lengths(every)
    assert lengths.tolist() == [len(wave) for wave in waves]
    assert {len(text.split()) for text in texts} == {1, 2, 3}
    for wave, text in zip(waves, texts, strict=True):
        sounds = np.flatnonzero(np.abs(wave) > 1e-4)
        assert 50 <= sounds[0] <= 101  # half of the pause to all of it
        # The tone of each digit is where its recording is: count its turns.
        parts = np.split(wave, np.flatnonzero(np.diff(sounds) > 40) + 1) if len(text.split()) == 1 else []
        if parts:
            spectrum = np.abs(np.fft.rfft(wave, 4000))
            assert abs(spectrum.argmax() * RATE / 4000 - 40 * (DIGITS.index(text) + 1)) < 8
    part = train.waves(keys(7, 3, seed=4, epoch=2))
    assert np.array_equal(part[0], waves[7])
    assert train.texts(keys(7, 3, seed=4, epoch=2)) == [texts[7], texts[3]]
    assert train.texts(all_keys(train, 4, 3)) != texts
    speakers = [set(train.speakers[chosen]) for chosen, _ in train._parts(every)]
    assert all(len(own) == 1 for own in speakers)


def test_held_out_recordings_are_in_no_training_sequence(archive):
    train = spoken_digits(archive, "train", num_samples=50)
    rest, part = hold_out(train, 0.25, num_samples=7)
    assert len(part) == 7
    assert len(rest) == 50
    assert not set(rest.starts) & set(part.starts)
    assert len(part.starts) == 10
    with pytest.raises(DataError, match="there are no recordings"):
        train.take(np.zeros(0, dtype=np.int64))


def test_archives_that_are_none_are_refused(archive, tmp_path):
    with pytest.raises(DataError, match=r"none\.npz does not exist; give an \.npz of spoken digits"):
        spoken_digits(tmp_path / "none.npz", "train", num_samples=1)
    np.savez(tmp_path / "other.npz", audio=np.zeros(3, dtype=np.int16))
    with pytest.raises(DataError, match=r"other\.npz has no field 'offsets'"):
        spoken_digits(tmp_path / "other.npz", "train", num_samples=1)


def source(archive, **settings):
    made = spoken_digits(archive, "train", num_samples=40, longest=3)
    features = LogMel(sample_rate=RATE, num_mels=8, window_seconds=0.064)
    return SpeechSource(made, features, CharTokenizer(alphabet([made])), **settings)


def test_batches_hold_features_and_texts(archive):
    made = source(archive, subsampling=2)
    batch = made.fetch(keys(0, 1, 2))
    texts = made.utterances.texts(keys(0, 1, 2))
    assert batch["frames"].tolist() == made.lengths(0, 0)[:3].tolist()
    assert batch["features"].shape == (3, int(batch["frames"].max()), 8)
    assert batch["num_items"] == sum(len(text) + 1 for text in texts)
    begin = made.tokenizer.vocab_size
    for row, text in enumerate(texts):
        ids = made.tokenizer.encode(text).tolist()
        assert batch["targets"][row, : len(ids) + 1].tolist() == [*ids, begin + 1]
        assert (batch["targets"][row, len(ids) + 1 :] == -100).all()
        assert batch["target_in"][row, : len(ids) + 1].tolist() == [begin, *ids]
        assert not batch["features"][row, batch["frames"][row] :].any()
    with pytest.raises(DataError, match=r"sequence 0: a text of \d+ characters needs \d+ outputs, its \d+ rows"):
        source(archive, subsampling=40).fetch(keys(0))


def test_masks_take_bands_and_rows_out(archive):
    augment = SpecAugment(band_width=3, time_width=6, time_share=0.5)
    plain, masked = source(archive), source(archive, augment=augment)
    before, after = plain.fetch(keys(5))["features"][0], masked.fetch(keys(5))["features"][0]
    changed = before != after
    assert changed.any()
    assert not after[changed].any()
    rows, bands = changed.all(1), changed.all(0)
    assert rows.sum() <= 12
    assert bands.sum() <= 6
    assert torch.equal(changed, (rows[:, None] | bands[None, :]) & (before != 0))
    assert torch.equal(masked.fetch(keys(9, 5))["features"][1, : len(after)], after)
    assert torch.equal(augment(before, np.zeros(augment.draws)), before)


def test_buckets_follow_lengths_that_change_with_the_epoch(archive):
    made = source(archive)
    plan = TokenBuckets(lambda epoch: made.lengths(3, epoch), max_tokens=200, seed=3)
    for epoch in range(3):
        steps = range(plan.first_step(epoch), plan.first_step(epoch + 1))
        batches = [plan.batch(step) for step in steps]
        assert sorted(index for batch in batches for index in batch.indices.tolist()) == list(range(40))
        lengths = made.lengths(3, epoch)
        assert all(len(batch) * lengths[batch.indices].max() <= 200 for batch in batches)
        assert all(batch.epoch == epoch for batch in batches)
    assert made.lengths(3, 0).tolist() != made.lengths(3, 1).tolist()


@pytest.fixture
def manifest(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "wavs").mkdir()
    for name, size in (("a.wav", 300), ("b.flac", 500)):
        soundfile.write(tmp_path / "wavs" / name, 0.5 * np.sin(np.arange(size) / 5), RATE)
    file = tmp_path / "train.tsv"
    file.write_text("wavs/a.wav\tyes\nwavs/b.flac\tno no\n")
    return file


def test_manifests_name_files_and_texts(manifest):
    made = Manifest(manifest)
    assert (len(made), made.sample_rate) == (2, RATE)
    assert made.lengths(keys(1, 0)).tolist() == [500, 300]
    assert made.texts(keys(1, 0)) == ["no no", "yes"]
    np.testing.assert_allclose(made.waves(keys(1))[0], 0.5 * np.sin(np.arange(500) / 5), atol=1e-4)
    other = manifest.with_suffix(".jsonl")
    other.write_text('{"path": "wavs/a.wav", "text": "yes"}\n{"audio": "wavs/b.flac", "text": "no no"}\n')
    assert Manifest(other).entries == made.entries


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("wavs/a.wav yes\n", r"train\.tsv, line 1: expected a path, a tab and a text, got 1 columns"),
        ("wavs/a.wav\t \n", r"train\.tsv, line 1: the text is empty"),
        ("wavs/c.wav\tyes\n", r"c\.wav does not exist; paths in a manifest are relative to it"),
        ("train.tsv\tyes\n", r"train\.tsv cannot be read as sound"),
        ("wavs/a.wav\tyes\nother.wav\tno\n", r"other\.wav has 500 samples a second, .*a\.wav has 1000; resample it"),
        ("stereo.wav\tyes\n", r"stereo\.wav has 2 channels; mix them down"),
    ],
)
def test_bad_manifests_are_refused(manifest, lines, message):
    import soundfile

    soundfile.write(manifest.parent / "other.wav", np.zeros(10), 500)
    soundfile.write(manifest.parent / "stereo.wav", np.zeros((10, 2)), RATE)
    manifest.write_text(lines)
    with pytest.raises(DataError, match=message):
        Manifest(manifest).lengths(keys(0))


def test_digit_sequences_need_a_length():
    with pytest.raises(ValueError, match="longest and num_samples must be at least 1, got 0 and 1"):
        DigitSequences(*(np.zeros(1, dtype=np.int64),) * 5, sample_rate=1, num_samples=1, longest=0)
