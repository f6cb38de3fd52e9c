"""Speech Commands v0.02: one second of speech, one word of 35, a stretch of sound a token.

    python train_speech.py                      # pretrained GPT-2, frozen, on log-mel frames
    python train_speech.py --pretrained 0       # random weights, frozen
    python train_speech.py --pretrained 0 --layers 0   # no block at all
    python train_speech.py --tokens wave        # 80 raw samples at 8 kHz a token
    python train_speech.py --demo 1             # generated tones, no download
    python train_speech.py --eval runs/speech/best.pt --predict clip.wav
"""
import sys

import torch
import torch.nn.functional as F
import torchaudio

import data
import fpt

parser = fpt.flags("speech", __doc__, steps=1500, demo=dict(steps=40, eval_every=20, batch_size=16))
parser.add_argument("--tokens", choices=["mel", "wave"], default="mel", help="what a token holds")
parser.add_argument("--augment", type=int, choices=[0, 1], default=1, help="1: shift training clips a little")

TIMES = {"mel": 51, "wave": 100}  # tokens in a clip


def tokenizer(tokens, device):
    """Returns a function: int16 [batch, 16000] -> float [batch, time, 80].

    mel: 51 frames, one every 20 ms, of 80 log-mel energies. wave: 100 stretches of 80 samples at 8 kHz.
    Each clip gets mean 0 and standard deviation 1, because how loud it is does not tell the word.
    """
    if tokens == "mel":
        frames = dict(n_fft=1024, win_length=640, hop_length=320, n_mels=80)
        mel = torchaudio.transforms.MelSpectrogram(data.SPEECH_RATE, **frames).to(device)
    else:
        resample = torchaudio.transforms.Resample(data.SPEECH_RATE, 8000).to(device)

    def to_tokens(waves):
        waves = waves / 32768
        if tokens == "mel":
            features = (mel(waves) + 1e-6).log().transpose(1, 2)
        else:
            features = resample(waves).unflatten(1, (100, 80))
        return F.layer_norm(features, features.shape[1:], eps=1e-10)  # 1e-5 is as large as a quiet wave

    return to_tokens


def shift(waves, most):
    """Move each clip [batch, samples] by up to `most` samples. What leaves at one end comes in at the other,
    because silence there would mark every training clip."""
    count, samples = waves.shape
    start = torch.randint(-most, most + 1, (count, 1), device=waves.device)
    return waves.gather(1, (start + torch.arange(samples, device=waves.device)) % samples)


def main(args):
    to_tokens = tokenizer(args.tokens, args.device)
    if args.predict:
        samples = torch.from_numpy(data.read_wav(args.predict).copy())
        if len(samples) > data.SPEECH_RATE:
            print(f"{args.predict} is longer than a second: only its first second is heard")
        wave = F.pad(samples, (0, data.SPEECH_RATE))[None, :data.SPEECH_RATE].to(args.device)
        model = fpt.FPT(args, inputs=80, outputs=len(args.classes), time=TIMES[args.tokens])
        return fpt.print_prediction(args, model, args.classes, to_tokens(wave))

    splits = data.speech_commands(args.data, args.demo)
    classes = splits.pop("classes")
    if getattr(args, "classes", classes) != classes:
        sys.exit(f"{args.data} holds the words {' '.join(classes)}, the run {' '.join(args.classes)}")
    args.classes = classes  # a checkpoint keeps the flags, and with them the words
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    dummy = splits["train"][1].mode().values.item()
    splits = {split: [part.to(args.device) for part in parts] for split, parts in splits.items()}

    def batch(split, index):
        waves, labels = splits[split]
        index = index.to(args.device, non_blocking=True)
        waves = waves[index]
        if split == "train" and args.augment:
            waves = shift(waves, data.SPEECH_RATE // 10)
        return to_tokens(waves), None, labels[index]

    model = fpt.FPT(args, inputs=80, outputs=len(args.classes), time=TIMES[args.tokens])
    return fpt.fit(args, model, batch, sizes, dummy)


if __name__ == "__main__":
    fpt.run(parser, main)
