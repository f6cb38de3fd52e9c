"""Speech Commands v0.02: one second of speech, one of 35 words. A token is a frame, every 20 ms.

    python train_speech.py                              # pretrained GPT-2, frozen
    python train_speech.py --pretrained 0               # random weights, frozen
    python train_speech.py --pretrained 0 --layers 0    # the baseline without blocks
    python train_speech.py --tokens wave                # a token is 10 ms of raw samples
    python train_speech.py --demo 1                     # generated tones, no download
    python train_speech.py --eval runs/speech/best.pt --predict clip.wav
"""
import sys

import torch
import torch.nn.functional as F
import torchaudio

import data
import fpt

TIMES = {"mel": 51, "wave": 100}  # tokens in a clip; mel frames are centred at 0, 20, ... 1000 ms
FRAMES = dict(n_fft=1024, win_length=640, hop_length=320)  # samples
MEL = torchaudio.transforms.MelSpectrogram(data.SPEECH_RATE, **FRAMES, n_mels=80)
RESAMPLE = torchaudio.transforms.Resample(data.SPEECH_RATE, 8000)

parser = fpt.flags("speech", __doc__, steps=2000, eval_every=1000)
parser.add_argument("--tokens", choices=TIMES, default="mel", help="log-mel frames or raw samples")
parser.add_argument("--augment", type=int, choices=[0, 1], default=1, help="1: shift in time")

def load(args):
    """The data for fpt.fit(): batch(split, index), the labels of each split. Sets args.words."""
    splits = data.speech_commands(args.data, args.demo)
    words = splits.pop("words")
    if getattr(args, "words", words) != words:
        sys.exit(f"{args.data} has the words {words}, the run has {args.words}")
    args.words = words  # a flag, so that checkpoints keep it
    labels = {split: y for split, (_, y) in splits.items()}
    splits = {split: (x.to(args.device), y.to(args.device)) for split, (x, y) in splits.items()}

    def batch(split, index):
        x, y = splits[split]
        index = index.to(args.device, non_blocking=True)
        waves = x[index]
        if split == "train" and args.augment:
            waves = augment(waves)
        return to_tokens(waves, args.tokens), None, y[index]

    return batch, labels

def augment(waves):
    """Shift each clip [batch, samples] by up to 0.1 s, in a circle: silence instead would mark the
    training clips."""
    count, samples = waves.shape
    shift = torch.randint(-samples // 10, samples // 10 + 1, (count, 1), device=waves.device)
    return waves.gather(1, (shift + torch.arange(samples, device=waves.device)) % samples)

def to_tokens(waves, kind):
    """int16 [batch, 16000] -> float32 [batch, time, 80]. mel: 80 log-mel energies of 40 ms frames,
    20 ms apart. wave: 80 samples at 8 kHz. Each clip is standardised: loudness is irrelevant."""
    waves = waves / 32768
    if kind == "mel":
        features = (MEL.to(waves.device)(waves) + 1e-6).log().transpose(1, 2)
    else:
        features = RESAMPLE.to(waves.device)(waves).unflatten(1, (100, 80))
    return F.layer_norm(features, features.shape[1:], eps=1e-10)  # below a quiet clip's variance

def main(args):
    if not args.predict:
        batch, labels = load(args)  # first, as it sets args.words
    model = fpt.FPT(args, inputs=80, outputs=len(args.words), time=TIMES[args.tokens])
    if not args.predict:
        return fpt.fit(args, model, batch, labels)
    wave = torch.tensor(data.read_wav(args.predict))  # only the first second is used
    fpt.print_prediction(args, model, args.words, to_tokens(wave[None], args.tokens))

if __name__ == "__main__":
    fpt.run(parser, main, demo=dict(steps=40, eval_every=20, batch_size=16))
