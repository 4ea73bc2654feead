package model

import (
	"slices"
	"strings"

	"github.com/distribution/reference"
)

// Image is the record of one image. It is shared and must not be changed.
type Image struct {
	ID          ImageID
	RepoTags    []string
	RepoDigests []string
	Size        int64  // bytes
	User        string // the image's USER
	Entrypoint  bool   // the image has an ENTRYPOINT or CMD; otherwise a container needs a command
	Labels      map[string]string
	// PartialLabels is set if Labels are incomplete, because there are too many or the image was
	// not inspected.
	PartialLabels bool
	// Stale is set if the engine did not describe the image in time. User, Entrypoint and Labels
	// may be missing.
	Stale bool
}

// StaleAfter returns the record of an image known only from the engine's list. It takes the missing
// facts from the previous record, which may be nil: the content behind an image ID never changes.
func (i *Image) StaleAfter(previous *Image) *Image {
	out := *i
	out.Stale, out.PartialLabels = true, true
	if previous != nil {
		out.User, out.Entrypoint = previous.User, previous.Entrypoint
		out.Labels, out.PartialLabels = previous.Labels, previous.PartialLabels
	}
	return &out
}

// Is reports whether ref is one of the image's names or its ID, possibly shortened.
func (i *Image) Is(ref string) bool {
	name := FamiliarName(ref)
	return name != "" && i.HasName(name) || i.HasID(ref)
}

// HasName reports whether familiar, a result of FamiliarName, is one of the image's names.
func (i *Image) HasName(familiar string) bool {
	return slices.Contains(i.RepoTags, familiar) || slices.Contains(i.RepoDigests, familiar)
}

// minShortID is the minimum length of a shortened image ID in digits. Docker prints twelve.
const minShortID = 12

// HasID reports whether ref is this image's ID, complete or shortened, with or without its
// algorithm.
func (i *Image) HasID(ref string) bool {
	if ref == string(i.ID) {
		return true
	}
	hex := strings.TrimPrefix(ref, imageAlgorithm)
	return len(hex) >= minShortID && strings.HasPrefix(i.ID.Hex(), hex)
}

// FamiliarName returns an image's name in the short form of Docker's lists: with the tag latest if
// ref has neither tag nor digest, and without a tag if ref has a digest. It returns "" if ref is
// not a name.
func FamiliarName(ref string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ""
	}

	if d, ok := named.(reference.Digested); ok {
		return reference.FamiliarName(named) + "@" + d.Digest().String()
	}

	return reference.FamiliarString(reference.TagNameOnly(named))
}

// DigestedName returns the image's name with digest for the status of pods (CRI image_ref). It
// prefers the repository of ref. It returns "" for an image without a digest, as after a local
// build.
func (i *Image) DigestedName(ref string) string {
	repository := ""
	if named, err := reference.ParseNormalizedNamed(ref); err == nil {
		repository = reference.FamiliarName(named)
	}

	for _, d := range i.RepoDigests {
		if name, _, _ := strings.Cut(d, "@"); name == repository {
			return d
		}
	}

	if len(i.RepoDigests) > 0 {
		return i.RepoDigests[0]
	}

	return ""
}

// ImageLabels are the labels that Docker copies from an image to its containers. Docker copies a
// label unless the creator of the container sets the same key.
type ImageLabels struct {
	Unknown bool // the image cannot be read, for instance because it was removed
	Labels  map[string]string
}

// InheritedLabels returns the labels that containers inherit from the image.
func (i *Image) InheritedLabels() ImageLabels {
	return ImageLabels{
		Unknown: i.PartialLabels,
		Labels:  i.Labels,
	}
}
