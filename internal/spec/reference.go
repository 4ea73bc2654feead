package spec

import (
	"strings"

	"github.com/distribution/reference"
)

// Familiar is an image's name as Docker lists it: the short form, with the tag latest where neither
// tag nor digest is given, and without the tag where there is a digest. "" if ref is no name.
func Familiar(ref string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ""
	}

	if d, ok := named.(reference.Digested); ok {
		return reference.FamiliarName(named) + "@" + d.Digest().String()
	}

	return reference.FamiliarString(reference.TagNameOnly(named))
}

// digested is the image's name with its digest, in the repository of ref if it is known by that, as
// pods show it (CRI image_ref); "" for an image without any, because it was built here.
func (i *Image) digested(ref string) string {
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

// Is says whether ref is one of the image's names, or its ID, which may be shortened.
func (i *Image) Is(ref string) bool {
	name := Familiar(ref)
	return name != "" && i.Named(name) || i.HasID(ref)
}

// shortestID is how many digits of an ID are taken for one: Docker shows twelve.
const shortestID = 12

// HasID says whether ref is this image's ID, whole or shortened, with or without its algorithm.
func (i *Image) HasID(ref string) bool {
	if ref == string(i.ID) {
		return true
	}
	hex := strings.TrimPrefix(ref, "sha256:")
	return len(hex) >= shortestID && strings.HasPrefix(i.ID.Hex(), hex)
}
