package translate

import (
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/moby/moby/api/types/image"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// ReadImage translates Docker's list item and inspect of an image. in may be empty. An invalid ID
// is InvalidArgument.
func ReadImage(s image.Summary, in image.InspectResponse) (*model.Image, error) {
	id, err := model.ParseImageID(s.ID)
	if err != nil {
		return nil, err
	}

	i := &model.Image{
		ID:   id,
		Size: s.Size,
	}

	i.RepoTags, i.RepoDigests = imageNames(s.RepoTags, s.RepoDigests)
	labels := s.Labels
	// the list of the containerd store omits digests of an image in several repositories
	if in.ID != "" {
		i.RepoTags, i.RepoDigests = imageNames(in.RepoTags, in.RepoDigests)
	}

	if c := in.Config; c != nil {
		i.User = text.Clean(c.User, text.MaxName)
		i.Entrypoint = len(c.Entrypoint)+len(c.Cmd) > 0
		if c.Labels != nil {
			labels = c.Labels
		}
	}

	i.Labels, i.PartialLabels = limitLabels(labels)

	return i, nil
}

// imageNames returns an image's tags and digests. After a pull by digest the containerd store lists
// the digest among the tags.
func imageNames(tags, digests []string) (_, _ []string) {
	tags, digests = validNames(tags), validNames(digests)
	for _, name := range tags {
		if strings.Contains(name, "@") && !slices.Contains(digests, name) {
			digests = append(digests, name)
		}
	}

	tags = slices.DeleteFunc(tags, func(name string) bool { return strings.Contains(name, "@") })

	return tags, digests
}

// validNames removes invalid names and the placeholders of old engines for images without a name.
func validNames(refs []string) []string {
	return slices.DeleteFunc(slices.Clone(refs), func(r string) bool {
		return strings.HasPrefix(r, "<none>") || len(r) > text.MaxName || !utf8.ValidString(r)
	})
}

// maxImageLabels is the maximum size in bytes of the labels in an image's record.
const maxImageLabels = 256 << 10

// limitLabels returns an image's labels. If there are too many, it returns only a label that
// containers could mistake for a record of this program, and isPartial is set.
func limitLabels(in map[string]string) (out map[string]string, isPartial bool) {
	size := 0
	for k, v := range in {
		size += len(k) + len(v)
	}

	if size <= maxImageLabels {
		return maps.Clone(in), false
	}

	out = map[string]string{}
	if v := in[labelRecord]; v != "" && len(v) <= maxRecord {
		out[labelRecord] = v
	}

	return out, true
}
