package translate

import (
	"strings"

	"github.com/moby/moby/api/types/container"

	"cri-dockerd/internal/model"
)

// HolderPrefix is the prefix of the names of holders, before the image's ID without its algorithm.
// The engine can filter a list by it.
const HolderPrefix = "cri-dockerd_image-volume_"

// HolderName returns the name of the holder of an image.
func HolderName(imageID model.ImageID) string { return HolderPrefix + imageID.Hex() }

// HeldImage returns the image of a holder with this name, false if it is not a holder's name.
// Labels do not count: an image may have any label.
func HeldImage(name string) (model.ImageID, bool) { return imageIn(name, HolderPrefix) }

// ImageOfReader returns the image of a reader with this name, false if it is not a reader's name.
func ImageOfReader(name string) (model.ImageID, bool) { return imageIn(name, ReaderPrefix) }

func imageIn(name, prefix string) (model.ImageID, bool) {
	hex, ok := strings.CutPrefix(strings.TrimPrefix(name, "/"), prefix)
	if !ok {
		return "", false
	}
	id, err := model.ParseImageID("sha256:" + hex)
	return id, err == nil
}

// NewHolder returns the request for a holder: a container that is never started. It keeps the
// engine from removing the layers of an image while this program has them mounted.
func NewHolder(imageID model.ImageID) *Create { return neverStarted(HolderName(imageID), imageID) }

// ReaderPrefix is the prefix of the names of readers, as HolderPrefix for holders.
const ReaderPrefix = "cri-dockerd_accounts_"

// NewReader returns the request for a reader: a container that is never started. It exists while
// this program reads the users and groups of an image, because the engine has no other way to read
// files of an image.
func NewReader(imageID model.ImageID) *Create {
	return neverStarted(ReaderPrefix+imageID.Hex(), imageID)
}

func neverStarted(name string, imageID model.ImageID) *Create {
	return &Create{
		Name: name,
		Config: &container.Config{
			Image:       string(imageID),
			Cmd:         []string{"never-started"},
			Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
		},
		Host: &container.HostConfig{
			LogConfig:   container.LogConfig{Type: "none"},
			NetworkMode: "none",
		},
	}
}
