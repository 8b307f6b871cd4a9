"""Speed and memory of training, compared with the bare network and with scripts that do not use Relook."""
