package model

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// ImageFilter selects images by ID, by name, or by a pattern like Docker's reference filter.
type ImageFilter struct {
	ref     string
	pattern string // ref without the default parts of a name, as in Docker's lists
}

// ParseImageFilter parses the filter of CRI ListImages. An empty filter selects all images. A
// malformed pattern is InvalidArgument.
func ParseImageFilter(ref string) (ImageFilter, error) {
	pattern := strings.TrimPrefix(ref, "index.")
	if rest, ok := strings.CutPrefix(pattern, "docker.io/"); ok {
		pattern = strings.TrimPrefix(rest, "library/")
	} else {
		pattern = ref
	}

	if _, err := path.Match(pattern, ""); err != nil {
		return ImageFilter{}, fmt.Errorf("filter.image.image: %q is not an image name, ID or pattern: %w", ref,
			errdefs.ErrInvalidArgument)
	}

	return ImageFilter{ref: ref, pattern: pattern}, nil
}

// IsPattern reports whether the filter has wildcards and may match several images.
func (f ImageFilter) IsPattern() bool { return strings.ContainsAny(f.ref, `*?[\`) }

// Match reports whether an image passes the filter. A repository without a tag matches all of its
// tags. Wildcards match within one component of a name, as in `docker images --filter reference=`.
func (f ImageFilter) Match(i *Image) bool {
	if f.ref == "" || !f.IsPattern() && i.Is(f.ref) {
		return true
	}

	for _, names := range [][]string{i.RepoTags, i.RepoDigests} {
		for _, name := range names {
			named, err := reference.ParseNormalizedNamed(name)
			if err != nil {
				continue
			}
			if ok, err := reference.FamiliarMatch(f.pattern, named); err == nil && ok {
				return true
			}
		}
	}

	return false
}
