"""Every key of a config, once, with Ho et al.'s (2020) settings for CIFAR-10.

The other files of this folder override a few keys each; the command line overrides
both: `--config.train.num_steps=200`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of everything random: initial weights, order of the data, t, noise, dropout

    config.data = data = ConfigDict()
    data.source = "files"  # digits (ships with scikit-learn), tfds:<name>, or files (at data.path)
    data.path = ""  # own images, before any source: a folder, a zip, an idx file; or where TFDS keeps its data sets
    data.split = "train"  # of TFDS, e.g. train, test, train+test; or the folder of that name within data.path
    data.test_split = ""  # held out: what --mode=evaluate adds to data.split, as that is written; "": nothing
    data.manual_dir = ""  # files that TFDS need not download, when it prepares a data set
    data.image_size = 32  # pixels, height = width
    data.channels = 3  # 1 (grey) or 3 (RGB)
    data.crop = 0  # side of the centre crop in pixels of the file; 0: the largest square
    data.flip = True  # flip every second image left to right, at random
    data.skip_corrupt = False  # True: leave out images that cannot be read; False: stop and name the first
    data.cache_dir = ""  # where decoded images are kept; "": ~/.cache/diffusion_jax
    data.cache_limit_gb = 64.0  # GB (1e9 bytes): images that need more are not kept, but decoded on the fly

    data.on_device = False  # keep the whole data set in each device's memory: the same batches, without the host

    config.schedule = schedule = ConfigDict()
    schedule.name = "ho_linear"  # su_linear, ho_linear or cosine
    schedule.num_steps = 1000  # T

    config.model = model = ConfigDict()
    model.channels = 128  # channels at full resolution, even
    model.multipliers = (1, 2, 2, 2)  # channels of each level, in units of model.channels; each level halves the size
    model.num_res_blocks = 2  # residual blocks per level on the way down; one more on the way up
    model.attention_resolutions = (16,)  # heights of the levels with self-attention
    model.dropout = 0.1  # rate
    model.num_groups = 32  # groups of GroupNorm, or the largest common divisor with the channels
    model.prediction = "eps_bar"  # what the network predicts: eps_bar (Ho et al.), x_0 or velocity
    model.attention = "xla"  # or cudnn: flash attention on NVIDIA GPUs, in bfloat16, up to 256 channels
    model.dtype = "float32"  # of the computation, float32 or bfloat16; parameters are float32

    config.train = train = ConfigDict()
    train.loss = "simple"  # simple (15), step (11), weighted_step (9) or vlb (the bound on the likelihood)
    train.t_sampling = "uniform"  # or importance: t of large terms more often, at less weight; for vlb
    train.num_steps = 800_000  # optimiser steps in all
    train.batch_size = 128  # images per step over all devices
    train.accumulate = 1  # parts of a device's share of the batch, one after another: less memory, the same step
    train.remat = False  # compute the blocks' activations again on the way back: less memory, more time
    train.steps_per_dispatch = 1  # steps in one program, for small networks on accelerators; slow on the CPU
    train.learning_rate = 2e-4  # Adam's, after the warm-up
    train.warmup_steps = 5000  # steps of linear warm-up from 0; 0: none
    train.grad_clip = 1.0  # largest norm of the gradient
    train.ema_decay = 0.9999  # of the average of the parameters, per step
    train.max_bad_steps = 0  # steps in a row whose loss or gradient is not finite, that are left out; one more stops
    train.log_every = 100  # steps between lines of metrics.jsonl
    train.checkpoint_every = 5000  # steps between checkpoints
    train.keep_checkpoints = 3  # how many of the latest to keep
    train.evaluate_every = 0  # steps between looks at held-out loss, samples and copies (docs/evaluation.md); 0: never
    train.sample_every = 20_000  # steps between grids of samples; 0: only at the end

    config.sampling = sampling = ConfigDict()
    sampling.sampler = "ancestral"  # ancestral (sigma, all steps), ddim (eta) or dpmpp_2m
    sampling.steps = 0  # of ddim, evenly spaced, or of dpmpp_2m, evenly in log-SNR; 0: all
    sampling.eta = 0.0  # scale of ddim's noise: 0 none, 1 that of the posterior
    sampling.sigma = "beta"  # zero (greedy), beta ("fixed large") or posterior ("fixed small")
    sampling.clip = True  # bound the predicted x_0 to [-1, 1] inside the chain
    sampling.num = 64  # images per call, and in the grids of the training

    return config
