# SPDX-License-Identifier: Apache-2.0
"""Other names of the functions in image_fixtures."""

from support import image_fixtures
from support.image_fixtures import MAGIC, REPOSITORY, jpeg  # noqa: F401

contents = image_fixtures.read_files
im2rec = image_fixtures.run_im2rec
official = image_fixtures.write_official_archives
prepare = image_fixtures.run_prepare
programs = image_fixtures.tar_programs
small = image_fixtures.small_dataset
stopping_in = image_fixtures.program_stopping_in
write = image_fixtures.write_files
