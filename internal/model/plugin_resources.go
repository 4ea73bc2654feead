package model

// PluginResources are resources of NRI plugins with a field in Docker's API, but not in the CRI. 0
// changes nothing.
type PluginResources struct {
	PidsLimit         int64 // processes and threads; -1 lifts the limit
	MemoryReservation int64 // bytes
}
