"""A network that compiles quickly; a process that a test starts can import it."""

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax import parts, unet


class SmallNetwork(nn.Module):
    """Stands for the UNet in tests of what happens around it: its train step compiles in a tenth of the time."""

    num_classes: int
    dropout: float
    dtype: object
    learned_sigma: bool = False

    @nn.compact
    def __call__(self, x, t, train=False, dropout_keys=None, labels=None):
        embedding = unet.time_embedding(t - 1, 8)
        if self.num_classes:
            labels = jnp.full(len(x), self.num_classes) if labels is None else labels
            embedding += nn.Embed(self.num_classes + 1, 8, name="class_embedding")(labels)
        h = unet.conv(8, self.dtype, name="conv_in")(x)
        h = nn.silu(h + unet.dense(8, self.dtype, name="temb_dense0")(embedding)[:, None, None])
        if train and self.dropout:
            h = unet.drop(h, self.dropout, dropout_keys)
        return unet.conv(
            x.shape[-1] * (1 + self.learned_sigma), self.dtype, init_scale=unet._NEARLY_ZERO, name="conv_out"
        )(h).astype(jnp.float32)


def small_model(config):
    """Stands for `parts.model`."""
    num_classes = parts.with_classes(config).model.num_classes
    return SmallNetwork(num_classes, config.model.dropout, jnp.dtype(config.model.dtype), config.model.learned_sigma)
