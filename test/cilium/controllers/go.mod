module cri-dockerd/test/cilium/controllers

go 1.26.0
