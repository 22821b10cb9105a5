"""Where masked tokens live in any model, and hooks that watch them there."""
