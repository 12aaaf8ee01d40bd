"""From video files to uint8 clips: decoding, sampling, cropping, and the pool of workers that does it ahead of the
step."""
