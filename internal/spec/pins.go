package spec

import (
	"fmt"
	"maps"
	"regexp"
	"strings"

	"github.com/distribution/reference"
)

// ImagePins are the images that the operator wants the kubelet to keep (CRI Image.pinned). The zero
// value pins none.
type ImagePins struct {
	names  []*regexp.Regexp
	labels []labelSelector
}

// labelSelector is one requirement on an image's labels.
type labelSelector struct {
	key, value string
	hasValue   bool
	negated    bool
}

// ParseImagePins reads the values of --pinned-images and --pinned-image-labels. A name is an
// image's name in any form that Docker takes; "*" stands for any characters, and a name without tag
// or digest stands for all of its repository. A selector is "key", "key=value" or one of them
// negated ("!key", "key!=value"). An image is pinned if one name or one selector matches. Errors
// name the entry.
func ParseImagePins(names, selectors []string) (ImagePins, error) {
	var p ImagePins
	for _, n := range names {
		pattern, err := namePattern(strings.TrimSpace(n))
		if err != nil {
			return ImagePins{}, fmt.Errorf("--pinned-images: %w", err)
		}
		p.names = append(p.names, pattern)
	}

	for _, s := range selectors {
		selector, err := parseSelector(strings.TrimSpace(s))
		if err != nil {
			return ImagePins{}, fmt.Errorf("--pinned-image-labels: %w", err)
		}
		p.labels = append(p.labels, selector)
	}

	return p, nil
}

// wildcard stands for "*" while a name is parsed; it is valid in every part of a name.
const wildcard = "x0wildcard0x"

// namePattern matches full names of images ("docker.io/library/web:1").
func namePattern(name string) (*regexp.Regexp, error) {
	if name == "*" {
		return regexp.MustCompile(""), nil
	}

	named, err := reference.ParseNormalizedNamed(strings.ReplaceAll(name, "*", wildcard))
	if err != nil {
		return nil, fmt.Errorf("%q is not an image's name: %w", name, err)
	}

	pattern := "^" + strings.ReplaceAll(regexp.QuoteMeta(named.String()), wildcard, ".*")
	if reference.IsNameOnly(named) {
		pattern += "([:@].*)?"
	}

	return regexp.MustCompile(pattern + "$"), nil
}

// selectorKey is what a label's key may consist of, so that a mistyped selector is an error.
var selectorKey = regexp.MustCompile(`^[A-Za-z0-9._/-]+$`)

func parseSelector(s string) (labelSelector, error) {
	var out labelSelector
	key, value, ok := strings.Cut(s, "=")
	switch {
	case ok:
		out.value, out.hasValue = strings.TrimPrefix(value, "="), true // "==" is the same as "="
		key, out.negated = strings.CutSuffix(key, "!")
	default:
		key, out.negated = strings.CutPrefix(s, "!")
	}

	if out.key = strings.TrimSpace(key); !selectorKey.MatchString(out.key) {
		return out, fmt.Errorf("%q is not a selector such as key, key=value or key!=value", s)
	}

	return out, nil
}

// Match reports whether the operator pins an image.
func (p ImagePins) Match(i *Image) bool {
	for _, list := range [][]string{i.RepoTags, i.RepoDigests} {
		for _, ref := range list {
			if p.matchName(ref) {
				return true
			}
		}
	}

	for _, s := range p.labels {
		value, ok := i.Labels[s.key]
		if matched := ok && (!s.hasValue || value == s.value); matched != s.negated {
			return true
		}
	}

	return false
}

func (p ImagePins) matchName(ref string) bool {
	if len(p.names) == 0 {
		return false
	}

	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return false
	}

	for _, pattern := range p.names {
		if pattern.MatchString(named.String()) {
			return true
		}
	}

	return false
}

// maxImageLabels bounds the labels of an image that are kept, in bytes.
const maxImageLabels = 256 << 10

// boundLabels returns an image's labels, or of an image with too many only what may look like a
// record of ours. whole is false then.
func boundLabels(in map[string]string) (out map[string]string, whole bool) {
	size := 0
	for k, v := range in {
		size += len(k) + len(v)
	}

	if size <= maxImageLabels {
		return maps.Clone(in), true
	}

	out = map[string]string{}
	if v := in[labelRecord]; v != "" && len(v) <= maxRecord {
		out[labelRecord] = v
	}

	return out, false
}

// Brings are the labels that the image brings into its containers.
func (i *Image) Brings() ImageLabels {
	return ImageLabels{
		Unknown: i.manyLabels,
		Labels:  i.Labels,
	}
}
