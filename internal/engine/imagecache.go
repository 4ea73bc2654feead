package engine

import (
	"maps"
	"slices"
	"strconv"
	"sync"

	"github.com/moby/moby/api/types/image"

	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
)

// imageCache caches the results of image inspects. An entry is valid while the image's entry in the
// list does not change.
type imageCache struct {
	listing keylock.Map // held during a list, so that an older list never replaces a newer one

	mu   sync.Mutex                    // guards the fields below; never held during a request
	byID map[model.ImageID]cachedImage // images of the last list; replaced, never modified
	// stale are the images to inspect again, with the number of requests to do so.
	stale map[model.ImageID]int
}

func newImageCache() imageCache {
	return imageCache{
		byID:  map[model.ImageID]cachedImage{},
		stale: map[model.ImageID]int{},
	}
}

type cachedImage struct {
	summary []string // see summaryOf
	image   *model.Image
}

// summaryOf returns the variable properties of an image in the list: its size and names.
func summaryOf(s image.Summary) []string {
	names := append(append([]string{strconv.FormatInt(s.Size, 10)}, s.RepoTags...), s.RepoDigests...)
	slices.Sort(names)
	return names
}

// put adds an image inspected independently of a list. The next list inspects it again.
func (c *imageCache) put(i *model.Image) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stale[i.ID]++
	c.byID = maps.Clone(c.byID)
	c.byID[i.ID] = cachedImage{image: i}
}

// remove deletes a removed image from the cache.
func (c *imageCache) remove(id model.ImageID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byID = maps.Clone(c.byID)
	delete(c.byID, id)
}

// snapshot returns the images of the last list, and the stale ones.
func (c *imageCache) snapshot() (byID map[model.ImageID]cachedImage, stale map[model.ImageID]int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID, maps.Clone(c.stale)
}

// replace stores the images of a new list. stale is the value of snapshot at the start of the list.
func (c *imageCache) replace(byID map[model.ImageID]cachedImage, stale map[model.ImageID]int) {
	c.mu.Lock()
	defer c.mu.Unlock()

	c.byID = byID
	for id, n := range stale {
		if c.stale[id] == n {
			delete(c.stale, id)
		}
	}
}

// get returns the image with this ID in the last list, or nil.
func (c *imageCache) get(id string) *model.Image {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[model.ImageID(id)].image
}

// has reports whether the last list had an image with this name or ID.
func (c *imageCache) has(ref string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()

	for _, i := range c.byID {
		if i.image.Is(ref) {
			return true
		}
	}

	return false
}
