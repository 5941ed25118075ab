"""Procedural scores for the demo model's training data: styles, labels, notes.

Decides what is played and which words describe it. Independent of MIDI encoding, synthesis and audio.
The scores are designed for a small model: one clear lead line spanning little more than an octave, so that a pitch
class nearly identifies a note, over a quiet accompaniment or none.
"""

import random
from dataclasses import dataclass

CLIP_S = 30.0
DRUM_CHANNEL = 9
LEAD_CHANNEL, COMP_CHANNEL, BASS_CHANNEL = 0, 1, 2
MIN_NOTE_S = 0.28
"""Shorter notes blur in a chroma window of 512 ms."""

SHARED_BPM = (72.0, 132.0)
"""Tempo range of melodies that are played in every style."""

LEAD_RANGE = (70, 83)
"""MIDI pitches of the lead: the register in which the demo codec preserves pitch best."""

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
PROGRESSIONS = {"happy": ((0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4)), "sad": ((0, 5, 2, 6), (0, 3, 4, 0), (0, 5, 3, 4))}
RHYTHMS = ((1, 1, 1, 1), (0.5, 0.5, 1, 1, 1), (2, 1, 1), (1, 0.5, 0.5, 2), (1.5, 0.5, 1, 1), (2, 2), (3, 1), (4,))
MOOD_WORDS = {
    "happy": ("happy", "cheerful", "joyful", "uplifting", "bright"),
    "sad": ("sad", "melancholic", "dark", "moody"),
}
ENERGY_WORDS = {
    "fast": ("energetic", "driving", "fast", "upbeat"),
    "mid": ("steady", "flowing", "groovy"),
    "slow": ("calm", "relaxed", "gentle", "slow"),
}
INSTRUMENTS = {
    29: "electric guitar", 30: "distorted guitar", 81: "saw synth", 80: "square synth", 65: "alto saxophone",
    66: "tenor saxophone", 56: "trumpet", 40: "violin", 73: "flute", 0: "piano", 24: "acoustic guitar", 21: "accordion",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Style:
    """Programs are General MIDI numbers from 0; ``bpm`` is the tempo range in beats per minute."""

    leads: tuple[int, ...]
    comp: int
    bass: int
    drums: str | None
    figure: str
    bpm: tuple[float, float]
    names: tuple[str, ...]


STYLES = {
    "rock": Style((29, 30), 29, 33, "rock", "pulse", (100, 144), ("rock", "rock band", "hard rock", "pop rock")),
    "edm": Style(
        (81, 80), 89, 38, "four", "pulse", (116, 136), ("edm", "dance", "techno", "club", "house", "electronic")
    ),
    "jazz": Style((65, 66, 56), 0, 32, "swing", "pad", (80, 124), ("jazz", "jazz trio", "swing", "smooth jazz")),
    "classical": Style((40, 73), 48, 43, None, "pad", (64, 108), ("classical", "orchestra", "baroque", "symphony")),
    "piano": Style((0,), 0, 0, None, "arpeggio", (60, 112), ("piano", "piano ballad", "ballad")),
    "folk": Style((24, 21), 25, 32, None, "arpeggio", (76, 124), ("folk", "acoustic folk", "country", "acoustic")),
    "chiptune": Style((80,), 80, 80, "four", "arpeggio", (116, 150), ("chiptune", "8-bit", "video game", "arcade")),
}


@dataclass(frozen=True, slots=True)
class Label:
    """Description of a clip with entries of this module's tables; clips of one ``group`` play the same melody."""

    style: str
    mood: str
    bpm: float
    lead: int
    arrangement: str
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """One note; times in seconds from the clip's start, ``pitch`` and ``velocity`` as in MIDI."""

    channel: int
    pitch: int
    velocity: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Score:
    """A clip of ``CLIP_S`` seconds."""

    label: Label
    notes: tuple[Note, ...]


def describe(label: Label, rng: random.Random) -> str:
    """A text prompt for a clip: a random selection and order of matching words (at most seven)."""
    energy = "fast" if label.bpm > 116 else "slow" if label.bpm < 84 else "mid"
    name = rng.choice(STYLES[label.style].names)
    parts = [name]
    if rng.random() < 0.7:
        parts.insert(0, rng.choice(MOOD_WORDS[label.mood]))
    if rng.random() < 0.4:
        parts.insert(0, rng.choice(ENERGY_WORDS[energy]))
    if rng.random() < 0.4:
        parts.append(INSTRUMENTS[label.lead])
    if label.arrangement == "solo" and rng.random() < 0.7:
        parts.append("solo")
    if rng.random() < 0.15:
        rng.shuffle(parts)
    return " ".join(parts)


def compose(rng: random.Random) -> Score:
    """One clip, determined entirely by ``rng``."""
    style_name = rng.choice(list(STYLES))
    style = STYLES[style_name]
    mood = rng.choice(("happy", "sad"))
    low, high = style.bpm
    middle = (low + high) / 2
    # Happy pieces use the faster part of the style's tempo range, sad ones the slower, so that the mood is audible.
    bpm = (
        rng.uniform(middle - 0.1 * (high - low), high)
        if mood == "happy"
        else rng.uniform(low, middle + 0.1 * (high - low))
    )
    arrangement = _draw_arrangement(rng)
    label = Label(style_name, mood, round(bpm, 2), rng.choice(style.leads), arrangement)
    return _play(label, 60.0 / bpm, rng)


def compose_in_every_style(rng: random.Random, group: str) -> tuple[Score, ...]:
    """One melody with its harmony and tempo, arranged in every style: the clips differ only in style and lead.

    The style can then be inferred only from the text, not from melody or tempo.
    """
    mood, bpm = rng.choice(("happy", "sad")), rng.uniform(*SHARED_BPM)
    arrangement, melody_seed = _draw_arrangement(rng), rng.random()
    return tuple(
        _play(
            Label(name, mood, round(bpm, 2), rng.choice(style.leads), arrangement, group),
            60.0 / bpm,
            random.Random(melody_seed),
        )
        for name, style in STYLES.items()
    )


def _draw_arrangement(rng: random.Random) -> str:
    return rng.choices(("solo", "simple", "full"), (0.3, 0.4, 0.3))[0]


def _play(label: Label, beat_s: float, rng: random.Random) -> Score:
    """A clip in sections of about 10 s, each in its own key."""
    num_bars = int(CLIP_S / (4 * beat_s)) + 1
    bars_a_section = max(2, round(10.0 / (4 * beat_s)))
    notes: list[Note] = []
    for first_bar in range(0, num_bars, bars_a_section):
        bars = range(first_bar, min(num_bars, first_bar + bars_a_section))
        tonic, progression = rng.randrange(12), rng.choice(PROGRESSIONS[label.mood])
        notes += _lead(label, bars, tonic, progression, beat_s, rng)
        if label.arrangement != "solo":
            notes += _accompaniment(label, bars, tonic, progression, beat_s)
    return Score(label, tuple(note for note in notes if note.start_s < CLIP_S))


def _pitch_in(low: int, tonic: int, scale: tuple[int, ...], degree: int) -> int:
    """The pitch of a scale's degree (any integer), where degree 0 is the tonic in the octave from ``low``."""
    octave, step = divmod(degree, 7)
    return low + (tonic - low) % 12 + 12 * octave + scale[step]


def _lead(
    label: Label, bars: range, tonic: int, progression: tuple[int, ...], beat_s: float, rng: random.Random
) -> list[Note]:
    scale = MAJOR if label.mood == "happy" else MINOR
    low, high = LEAD_RANGE
    rhythms = [rhythm for rhythm in RHYTHMS if min(rhythm) * beat_s >= MIN_NOTE_S]
    motif = [rng.choice(rhythms) for _ in range(2)]
    degree, notes = rng.randrange(7), []
    for bar in bars:
        chord, at_s = progression[bar % 4], bar * 4 * beat_s
        for index, beats in enumerate(motif[bar % 2] if rng.random() < 0.7 else rng.choice(rhythms)):
            if index == 0:
                tones = [chord + third + 7 * octave for third in (0, 2, 4) for octave in (-1, 0, 1)]
                here = degree
                degree = min(tones, key=lambda tone: abs(tone - here) + rng.random())
            else:
                degree += rng.choice((-2, -1, -1, 1, 1, 2, 3, -3))
            while _pitch_in(low, tonic, scale, degree) > high:
                degree -= 7
            while _pitch_in(low, tonic, scale, degree) < low:
                degree += 7
            pitch, end_s = _pitch_in(low, tonic, scale, degree), at_s + beats * beat_s
            notes.append(Note(LEAD_CHANNEL, pitch, rng.randint(104, 118), at_s, end_s - 0.015))
            at_s = end_s
    return notes


def _accompaniment(label: Label, bars: range, tonic: int, progression: tuple[int, ...], beat_s: float) -> list[Note]:
    style, full = STYLES[label.style], label.arrangement == "full"
    scale = MAJOR if label.mood == "happy" else MINOR
    notes: list[Note] = []

    def add(channel: int, pitch: int, velocity: int, beat: float, beats: float) -> None:
        notes.append(
            Note(channel, pitch, velocity, (4 * bar + beat) * beat_s, (4 * bar + beat + beats) * beat_s - 0.02)
        )

    for bar in bars:
        chord = progression[bar % 4]
        triad = [_pitch_in(46, tonic, scale, chord + third) for third in (0, 2, 4)]
        root = _pitch_in(34, tonic, scale, chord)
        for beat in range(4):
            add(BASS_CHANNEL, root + (7 if style.drums == "swing" and beat % 2 else 0), 84, beat, 1)
        if full or style.drums is None:
            if style.figure == "arpeggio":
                for half in range(8):
                    add(COMP_CHANNEL, triad[(0, 1, 2, 1)[half % 4]], 60, half / 2, 0.5)
            elif style.figure == "pulse":
                for beat in range(4):
                    for pitch in triad[:2]:
                        add(COMP_CHANNEL, pitch, 56, beat, 0.8)
            else:
                for pitch in triad:
                    add(COMP_CHANNEL, pitch, 58, 0, 4)
        for pitch, velocity, at_beat in DRUMS[style.drums]:
            add(DRUM_CHANNEL, pitch, velocity, at_beat, 0.2)
    return notes


_KICK, _SNARE, _HAT, _PEDAL_HAT, _RIDE = 36, 38, 42, 44, 51
DRUMS: dict[str | None, tuple[tuple[int, int, float], ...]] = {
    None: (),
    "rock": tuple(
        [(_HAT, 62, half / 2) for half in range(8)]
        + [(_KICK, 100, beat) for beat in (0, 2)]
        + [(_SNARE, 96, beat) for beat in (1, 3)]
    ),
    "four": tuple([(_KICK, 108, beat) for beat in range(4)] + [(_HAT, 66, beat + 0.5) for beat in range(4)]),
    "swing": tuple(
        [(_RIDE, 70, beat) for beat in range(4)]
        + [(_RIDE, 56, beat + 2 / 3) for beat in (1, 3)]
        + [(_PEDAL_HAT, 64, beat) for beat in (1, 3)]
    ),
}
"""(General MIDI drum, velocity, beat of the bar) of each pattern."""
