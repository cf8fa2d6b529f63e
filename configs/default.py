"""Every key of a config, once, with Ho et al.'s (2020) settings for CIFAR-10.

Each of the other files in this folder overrides a few keys; the command line overrides both:
`--config.train.num_steps=200`.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # seed of initial weights, order of the data, t, noise and dropout

    config.data = data = ConfigDict()
    data.source = "files"  # digits (ships with scikit-learn), tfds:<name>, hf:<owner>/<name>, or files (at data.path)
    data.path = (
        ""  # own images in place of data.source: a folder, a zip, idx, Parquet, .npy, .npz; or the folder of TFDS
    )
    data.split = "train"  # a split of TFDS, e.g. train, test, train+test; or the folder of that name within data.path
    data.test_split = ""  # held-out split; --mode=evaluate measures it too; "": none
    data.manual_dir = ""  # folder of files that TFDS cannot download itself
    # height and width in pixels, or (height, width); of arrays also (length,): signals, (depth, height, width): volumes
    data.image_size = FieldReference(32, field_type=object)
    data.channels = 3  # 1 (grey), 3 (RGB), 4 (RGBA, with alpha), or as many as an array has
    data.range = ()  # (lo, hi): the numbers of an array that become -1 and 1, as float32; (): uint8
    data.crop = 0  # height of the centre crop in pixels of the file, in the shape of image_size; 0: the largest
    data.flip = True  # flip images left to right, along their last axis, with probability 1/2; False for signals
    data.skip_corrupt = False  # True: skip images that cannot be read; False: stop and name the first
    data.cache_dir = ""  # folder of the decoded images; "": ~/.cache/diffusion_jax
    data.cache_limit_gb = 64.0  # largest cache in GB (1e9 bytes); more images are decoded on the fly

    data.classes = ()  # names of the classes; training fills them in from the data
    data.dtype = ""  # type of an array's numbers, which samples.npz gets; "" for pictures; training fills it in
    data.on_device = False  # keep the data set in each device's memory: the same batches, no transfers from the host

    config.schedule = schedule = ConfigDict()
    schedule.name = "ho_linear"  # su_linear, ho_linear, cosine or sigmoid
    schedule.num_steps = 1000  # T
    schedule.log_snr_shift = 0.0  # added to log SNR at each t, e.g. 2 log(64/image_size) for larger images
    schedule.zero_terminal = False  # True: alpha_bar_T = 0; for model.prediction=x_0 or velocity

    config.model = model = ConfigDict()
    model.channels = 128  # channels at full resolution, even
    model.multipliers = (1, 2, 2, 2)  # channels of each level, in units of model.channels; each level halves the size
    model.num_res_blocks = 2  # residual blocks per level on the way down; one more on the way up
    model.attention_resolutions = (16,)  # heights of the levels with self-attention, for any width; or lengths, depths
    model.dropout = 0.1  # rate
    model.num_groups = 32  # groups of GroupNorm, or the largest common divisor with the channels
    model.prediction = "eps_bar"  # output of the network: eps_bar (Ho et al.), x_0 or velocity
    model.learned_sigma = (
        False  # True: the network has the deviations too; with train.loss=hybrid, sampling.sigma=learned
    )
    # 0: without classes; auto: as many as the data has, or their number, which must agree
    model.num_classes = FieldReference(0, field_type=object)
    model.attention = "xla"  # or cudnn: flash attention on NVIDIA GPUs, in bfloat16, up to 256 channels
    model.dtype = "float32"  # dtype of the computation, float32 or bfloat16; parameters are float32

    config.train = train = ConfigDict()
    train.loss = "simple"  # simple (15), step (11), weighted_step (9), vlb (the bound on the likelihood) or hybrid
    train.weight = "one"  # weight of loss=simple by t: one, min_snr (min(SNR, gamma)/SNR) or p2 ((1 + SNR)^-gamma)
    train.weight_gamma = 5.0  # gamma of train.weight: 5 for min_snr, 0.5 or 1 for p2
    train.t_sampling = "uniform"  # or importance, for vlb: draws t with large terms more often, and weights them less
    train.num_steps = 800_000  # optimizer steps in total
    train.batch_size = 128  # images per step over all devices
    train.accumulate = 1  # parts of a per-device batch, computed one after another: less memory, the same step
    train.deterministic = False  # True: the same steps bit for bit on any number of devices; see docs/performance.md
    train.remat = False  # recompute activations in the backward pass: less memory, more time
    train.steps_per_dispatch = 1  # steps in one program, for small networks on accelerators; slow on the CPU
    train.label_dropout = 0.1  # probability that a label becomes "no class", which guidance needs; with num_classes
    train.learning_rate = 2e-4  # Adam's learning rate after the warm-up
    train.warmup_steps = 5000  # steps of linear warm-up from 0; 0: none
    train.grad_clip = 1.0  # largest norm of the gradient
    train.ema_decay = 0.9999  # decay per step of the parameters' average
    train.ema_warmup = False  # True: the decay starts at 0.1 and rises to ema_decay, for runs of few steps
    train.max_bad_steps = 0  # consecutive non-finite steps to skip; one more stops the run
    train.log_every = 100  # steps between lines of metrics.jsonl
    train.checkpoint_every = 5000  # steps between checkpoints
    train.keep_checkpoints = 3  # number of the latest checkpoints to keep
    train.evaluate_every = 0  # steps between evaluations during training (docs/evaluation.md); 0: never
    train.sample_every = 20_000  # steps between grids of samples; 0: only at the end
    train.snapshot_every = 0  # steps between snapshots for averages of any length (docs/averages.md); 0: never

    config.sampling = sampling = ConfigDict()
    sampling.sampler = "ancestral"  # ancestral (sigma, all steps), ddim or dpmpp_2m (both with eta)
    sampling.steps = 0  # steps of ddim or dpmpp_2m; 0: all
    sampling.grid = "default"  # uniform (ddim), quadratic, log_snr (dpmpp_2m) or bound (after --mode=evaluate)
    sampling.eta = 0.0  # scale of the noise of ddim and dpmpp_2m, from 0 (none) to 1 (that of the posterior)
    sampling.sigma = "beta"  # zero (greedy), beta ("fixed large"), posterior ("fixed small"), learned or analytic
    sampling.clip = True  # bound the predicted x_0 to [-1, 1] inside the chain
    sampling.guidance = 1.0  # weight of classifier-free guidance: 0 ignores the class, 1 is the plain conditional model
    sampling.guidance_interval = ()  # (low, high): guidance at these steps t only; (): at all
    sampling.num = 64  # images per call, and per grid during training

    return config
