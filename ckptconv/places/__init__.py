"""Checkpoints that are not on this disk: fsspec URLs (``s3://``, ``gs://``, ``https://``, …) and the Hugging Face cache (``hf://``).

A remote checkpoint is mirrored: every file of it becomes a sparse placeholder of its true size in a scratch folder, and a reader that asks
for a range of one waits until the range has arrived. So everything above works on paths, and only what is read is fetched. Outputs are
made and verified in the scratch folder, and sent when they are whole.

Nothing here is imported, and nothing costs anything, as long as all words of a command are local paths.
"""
