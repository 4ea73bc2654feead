package model

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/distribution/reference"
)

// ImagePins selects the images that the kubelet must not garbage-collect (CRI Image.pinned). The
// zero value selects none.
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

// ParseImagePins parses the values of --pinned-images and --pinned-image-labels. A name has any
// form that Docker accepts; "*" matches any characters, and a name without tag or digest matches
// its repository. A selector is "key", "key=value" or a negation ("!key", "key!=value"). An image
// is pinned if at least one name or selector matches. Errors quote the entry.
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

// wildcard replaces "*" while a name is parsed. It is valid in every part of a name.
const wildcard = "x0wildcard0x"

// namePattern returns an expression for full names of images ("docker.io/library/web:1").
func namePattern(name string) (*regexp.Regexp, error) {
	if name == "*" {
		return regexp.MustCompile(""), nil
	}

	named, err := reference.ParseNormalizedNamed(strings.ReplaceAll(name, "*", wildcard))
	if err != nil {
		return nil, fmt.Errorf("%q is not an image name: %w", name, err)
	}

	pattern := "^" + strings.ReplaceAll(regexp.QuoteMeta(named.String()), wildcard, ".*")
	if reference.IsNameOnly(named) {
		pattern += "([:@].*)?"
	}

	return regexp.MustCompile(pattern + "$"), nil
}

// selectorKey is the grammar of a label's key. It rejects mistyped selectors.
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
		return out, fmt.Errorf("%q is not a label selector such as key, key=value or key!=value", s)
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
