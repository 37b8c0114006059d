"""vLLM serves compositions: a plugin that merges the one a request names, and a front that routes `auto` and forwards."""
